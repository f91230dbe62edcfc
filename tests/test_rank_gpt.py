"""The LLM teacher against a small server on loopback: order, faults, journal, limits, batches."""

import asyncio
import fcntl
import json
import random
import subprocess
import sys
import time

import pytest

from data_prep.rank_gpt import main, read_job
from data_prep.teacher_arguments import build_parser
from fake_llm import FakeLlm
from setenc_hf.errors import InputError
from setenc_hf.trec import read_lists

LENGTHS = {"q1": 1, "q7": 7, "q20": 20, "q25": 25, "q95": 95, "q100": 100}
WINDOWS = 0 + 1 + 1 + 2 + 9 + 9
KEY = "sk-very-secret-key"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("asyncio.sleep", _short_sleep)


SLEPT: list[float] = []
SLEEP = asyncio.sleep


async def _short_sleep(seconds):
    SLEPT.append(seconds)
    await SLEEP(min(seconds, 0.01))


@pytest.fixture
def data(tmp_path):
    """Lists of many lengths; passage `q-n` of a query is worth a number drawn at random."""
    draw, folder = random.Random(7), tmp_path / "collection"
    folder.mkdir()
    corpus, queries, run, qrels = [], [], [], []
    for query_id, length in LENGTHS.items():
        queries.append(f"{query_id}\twhat is {query_id}\n")
        for rank, worth in enumerate(draw.sample(range(1000), length), start=1):
            text = f"{query_id} {rank} is\nworth {worth} [{rank}]"
            corpus.append(json.dumps({"doc_id": f"{query_id}-{rank}", "text": text}) + "\n")
            run.append(f"{query_id} Q0 {query_id}-{rank} {rank} {1000 - rank} first\n")
    corpus.append(json.dumps({"doc_id": "extra", "text": "worth 5000"}) + "\n")
    qrels = ["q25 0 extra 2\n", "q25 0 q25-3 1\n", "q7 0 extra 0\n"]
    files = {"corpus.jsonl": corpus, "queries.tsv": queries, "qrels.txt": qrels}
    for name, lines in files.items():
        (folder / name).write_text("".join(lines))
    (tmp_path / "first.run").write_text("".join(run))
    return tmp_path


def rank(data, fake, *flags, output="teacher.run"):
    """Run the command against `fake`; return its exit status."""
    argv = ["--run", str(data / "first.run"), "--collection", str(data / "collection"), "--model", "m"]
    argv += ["--output", str(data / output), "--base-url", fake.url if fake else "http://127.0.0.1:9/v1"]
    try:
        main([*argv, *map(str, flags)])
    except SystemExit as end:
        return end.code
    return 0


def orders(data, output="teacher.run"):
    return {query_id: [line.doc_id for line in lines] for query_id, lines in read_lists(data / output)}


def test_a_full_window_sorts_every_list(data):
    with FakeLlm() as fake:
        assert rank(data, fake, "--window-size", 100, "--stride", 50) == 0
    worth = {
        row["doc_id"]: int(row["text"].split("worth ")[1].split()[0])
        for row in map(json.loads, (data / "collection/corpus.jsonl").read_text().splitlines())
    }
    assert list(orders(data)) == list(LENGTHS)
    for query_id, doc_ids in orders(data).items():
        assert len(doc_ids) == LENGTHS[query_id]
        assert doc_ids == sorted(doc_ids, key=lambda doc_id: -worth[doc_id])
    assert len(fake.bodies) == len(LENGTHS) - 1  # one passage has an order already


@pytest.mark.parametrize("prompt", ["rank_gpt", "single_message", "template"])
def test_prompts_hold_the_passages_in_order_and_on_one_line(data, prompt):
    if prompt == "template":
        template = data / "own.txt"
        template.write_text('{query}? Say {"ranking": ...} for {num_passages}:\n{passages}')
    name = str(template) if prompt == "template" else prompt
    with FakeLlm() as fake:
        assert rank(data, fake, "--prompt", name, "--system", "be brief", "--passage-words", 6) == 0
    body = min(fake.bodies, key=lambda body: len(json.dumps(body)))  # the list of 7
    text = "\n".join(message["content"] for message in body["messages"])
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert body["temperature"] == 0
    assert "what is q7" in text
    assert "[2] q7 2 is worth" in text
    assert "(2)" in text  # of the passage, no longer an identifier; the sixth word is the last
    assert len(fake.bodies) == WINDOWS
    assert len(body["messages"]) == (1 + 1 + 1 + 2 * 7 + 1 if prompt == "rank_gpt" else 2)


def test_faults_change_nothing_and_no_window_is_asked_again_that_was_answered(data):
    with FakeLlm() as fake:
        assert rank(data, fake, output="calm.run") == 0
    script = [(429, "rate_limit", {"Retry-After": "7"}), (500, "server"), "cut", "I'm sorry, I can't.", "", (503, None)]
    with FakeLlm(script, latency=0.01) as fake:
        assert rank(data, fake, "--concurrency", 4) == 0
        assert len(fake.bodies) == WINDOWS + len(script)
        assert 1 < fake.max_in_flight <= 4
    assert any(7 <= seconds <= 7.7 for seconds in SLEPT)
    assert (data / "teacher.run").read_bytes() == (data / "calm.run").read_bytes()


def test_a_hang_ends_at_the_timeout_and_may_have_been_billed(data, capsys):
    with FakeLlm(["hang"]) as fake:
        assert rank(data, fake, "--timeout", 1) == 0
    out = capsys.readouterr().out
    assert "sent again (server)       1 (time-out 1)" in out
    assert "1 requests whose answer never came whole" in out


def test_summary_counts_by_kind(data, capsys):
    with FakeLlm(["[1] > [1] > [99]", "no", "[2] > [1]"]) as fake:
        assert rank(data, fake, "--concurrency", 1) == 0
    rows = (line.strip().partition("  ") for line in capsys.readouterr().out.splitlines())
    lines = {name: value.strip() for name, _, value in rows}
    assert lines["windows answered"] == str(WINDOWS)
    assert lines["well-formed"] == str(WINDOWS - 2)
    assert lines["repaired"] == "2 (missing 2, out of range 1, repeated 1)"
    assert lines["asked again (no ranking)"] == "1"
    assert lines["prompt tokens"] == f"{100 * (WINDOWS + 1):,}"  # the answer without a ranking was paid too
    assert lines["lists failed"] == "0"


def test_a_list_without_a_ranking_is_left_out_and_named(data, capsys):
    with FakeLlm() as fake:
        fake.refuse = "what is q7"
        assert rank(data, fake, "--attempts", 3) == 3
        assert len(fake.bodies) == WINDOWS + 2
    assert list(orders(data)) == ["q1", "q20", "q25", "q95", "q100"]
    failed = (data / "teacher.run.failed.tsv").read_text()
    assert failed.startswith("q7\tno ranking in 3 answers")
    assert "1 lists failed and are not in the run" in capsys.readouterr().err
    with FakeLlm() as fake:  # nothing is asked again, unless more attempts are allowed
        assert rank(data, fake, "--attempts", 3) == 3
        assert fake.bodies == []
        assert rank(data, fake, "--attempts", 4) == 0
        assert len(fake.bodies) == 1
    assert list(orders(data)) == list(LENGTHS)
    assert not (data / "teacher.run.failed.tsv").exists()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ((401, "invalid_api_key"), "401: .* refuses the key in OPENAI_API_KEY"),
        ((403, "no"), "403: .* does not allow"),
        ((404, "model_not_found"), "404: .* is --model known"),
        ((400, "bad"), "400: .* told to: Bearer .key."),
        ((429, "insufficient_quota"), "no credit left"),
        ((429, "daily", {"Retry-After": "86400"}), "asks to wait 86400 s"),
    ],
)
def test_what_no_retry_can_mend_stops_the_job_at_once(data, fault, says):
    with FakeLlm([fault] * 99, latency=0.05) as fake, pytest.raises(InputError, match=says) as error:
        rank(data, fake, "--concurrency", 3)
    assert 1 <= len(fake.bodies) <= 3
    assert "\n" not in str(error.value)
    assert not (data / "teacher.run").exists()
    assert KEY not in str(error.value) + (data / "teacher.run.journal.jsonl").read_text()


def test_what_ends_a_job_loses_no_answer_in_flight(data):
    with FakeLlm([None, (400, "context_length_exceeded")], latency=0.2) as fake:
        with pytest.raises(InputError, match="what was answered is in the journal"):
            rank(data, fake, "--concurrency", 4)
        journal = (data / "teacher.run.journal.jsonl").read_text()
        assert journal.count('"type": "answer"') == len(fake.bodies) - 1 >= 3
        assert rank(data, fake, "--concurrency", 4) == 0
        assert len(fake.bodies) == WINDOWS + 1


def test_sigterm_loses_no_answer_in_flight(data):
    words = ["--run", data / "first.run", "--collection", data / "collection", "--model", "m", "--concurrency", "4"]
    with FakeLlm(latency=1.0) as fake:
        words += ["--output", data / "teacher.run", "--base-url", fake.url]
        process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.rank_gpt", *map(str, words)], stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while fake.in_flight < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):  # `timeout` sends two
            process.terminate()
            time.sleep(0.1)
        assert process.wait(timeout=60) == 143, process.stderr.read()
        assert len(fake.bodies) == 4
    journal = (data / "teacher.run.journal.jsonl").read_text()
    assert journal.count('"type": "answer"') == 4
    assert not (data / "teacher.run").exists()


def test_what_was_paid_at_other_prices_counts_at_those(data, capsys):
    flags = ("--prompt", "single_message", "--max-answer-tokens", 150, "--system", "", "--concurrency", 1)
    dear = ("--price-input", 10_000, "--price-output", 1_000)  # 1.01 a window
    cheap = ("--price-input", 5_000, "--price-output", 500)
    with FakeLlm() as fake:
        assert rank(data, fake, *flags, *dear, "--max-cost", 12) == 4
        paid = len(fake.bodies) * 1.01
        # by the cheaper prices alone half of it would seem to be left
        assert rank(data, fake, *flags, *cheap, "--max-cost", f"{paid + 0.1:.2f}") == 4
        assert len(fake.bodies) * 1.01 == paid
        capsys.readouterr()
        assert rank(data, fake, *flags, *cheap, "--max-cost", 100) == 0
    left = WINDOWS - round(paid / 1.01)
    assert f"cost                      {paid + left * 0.505:.4f}" in capsys.readouterr().out


def test_a_connection_that_was_never_made_is_not_counted_as_billed(data, monkeypatch):
    import openai

    class ConnectTimeout(Exception):  # by this name, of whatever library the client speaks HTTP with
        pass

    async def time_out(self, *_, **__):
        raise openai.APITimeoutError(None) from ConnectTimeout

    monkeypatch.setattr(openai.AsyncOpenAI, "post", time_out)
    with pytest.raises(InputError, match="the last: no connection"):
        rank(data, None, "--max-retries", 1)
    assert '"unanswered"' not in (data / "teacher.run.journal.jsonl").read_text()


@pytest.mark.parametrize(
    ("base_url", "limit"),
    [
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://eu.api.openai.com/v1", "max_completion_tokens"),
        ("https://notapi.openai.com.example.org/v1", "max_tokens"),
        ("http://localhost:8000/v1", "max_tokens"),
    ],
)
def test_openais_servers_know_the_new_name_of_the_limit_in_every_region(data, base_url, limit):
    words = ["--run", data / "first.run", "--collection", data / "collection", "--model", "m", "--output", "x.run"]
    teacher, lists = read_job(build_parser("").parse_args([*map(str, words), "--base-url", base_url]))
    assert limit in teacher.request(lists[1], lists[1].sliding.window).body


def test_answers_cut_in_a_thought_are_no_rankings_and_not_asked_again_in_vain(data, capsys):
    thought = {"answer": "comparing the two, [3] > [5], since", "finish_reason": "length"}
    nothing = {"answer": "", "finish_reason": "length"}
    ranking = {"answer": "[2] > [1] > [3] > [4] > [5] > [6", "finish_reason": "length"}
    lines = (data / "first.run").read_text().splitlines(keepends=True)
    (data / "first.run").write_text("".join(line for line in lines if line.startswith("q7 ")))
    with FakeLlm([thought, nothing]) as fake:
        assert rank(data, fake, "--attempts", 3) == 3
        assert len(fake.bodies) == 2  # not again after the empty answer
    failed = (data / "teacher.run.failed.tsv").read_text()
    assert failed == "q7\tno ranking in 2 answers, the last: '', which ended at its limit of 384 tokens\n"
    with FakeLlm([ranking]) as fake:
        assert rank(data, fake, output="cut.run") == 0
    assert orders(data, "cut.run")["q7"] == [f"q7-{rank}" for rank in (2, 1, 3, 4, 5, 6, 7)]
    assert "answers cut at their limit  1 windows: raise --max-answer-tokens" in capsys.readouterr().out


def test_a_model_that_never_ranks_is_not_paid_for_to_the_end(data, monkeypatch):
    monkeypatch.setattr("data_prep.ask_lists.UNRANKED_AT_FIRST", 2)
    with FakeLlm([{"answer": "", "finish_reason": "length"}] * 99) as fake:
        with pytest.raises(
            InputError, match="the first 2 lists got no ranking in 1 answers, .* its limit of 384 tokens"
        ):
            rank(data, fake, "--concurrency", 1)
        assert 2 <= len(fake.bodies) <= 4
        fake.script.clear()
        assert rank(data, fake) == 3  # what failed is not asked again, what was not asked is ranked


def test_a_server_that_is_gone_ends_the_job(data):
    with pytest.raises(InputError, match="windows in a row got no answer in 3 requests, the last: no connection"):
        rank(data, None, "--max-retries", 2)


def test_the_key_goes_to_the_server_and_nowhere_else(data, capsys, monkeypatch):
    with FakeLlm() as fake:
        rank(data, fake)
        assert fake.keys == {f"Bearer {KEY}"}
        monkeypatch.delenv("OPENAI_API_KEY")
        assert rank(data, fake, output="local.run") == 0  # a server in the own network needs none
        fake.url = "https://api.example.com/v1"
        with pytest.raises(InputError, match="set the environment variable OPENAI_API_KEY"):
            rank(data, fake, output="far.run")
        fake.url = f"http://user:{KEY}@localhost/v1"
        with pytest.raises(InputError, match="leave user, password and key out") as error:
            rank(data, fake, output="far.run")
    written = [path.read_text() for path in data.iterdir() if path.is_file()]
    assert KEY not in "".join(written) + "".join(capsys.readouterr()) + str(error.value)


def test_resume_replay_and_a_cut_last_line(data):
    with FakeLlm() as fake:
        assert rank(data, fake) == 0
        journal, run = data / "teacher.run.journal.jsonl", (data / "teacher.run").read_bytes()
        lines = journal.read_bytes().splitlines(keepends=True)
        (data / "teacher.run").unlink()
        journal.write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
        asked = len(fake.bodies)
        assert rank(data, None, "--replay") == 3  # what is not in the journal is not made up
        assert rank(data, fake) == 0
        assert len(fake.bodies) == asked + 3
    assert (data / "teacher.run").read_bytes() == run
    assert rank(data, None, "--replay", journal, output="again.run") == 0
    assert (data / "again.run").read_bytes() == run
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:40] + b"\n" + b"".join(lines[4:]))
    with pytest.raises(InputError, match=r"teacher.run.journal.jsonl:4: not a line of a journal"):
        rank(data, None, "--replay")


def test_changed_settings_are_noticed(data):
    with FakeLlm() as fake:
        rank(data, fake)
        asked = len(fake.bodies)
        with pytest.raises(InputError, match=r"temperature was 0\.0, is 0\.5; window_size was 20, is 25"):
            rank(data, fake, "--temperature", 0.5, "--window-size", 25)
        assert len(fake.bodies) == asked
        assert rank(data, fake, "--passes", 2, "--accept-changes") == 0
        assert len(fake.bodies) < asked + WINDOWS + 1  # the first pass was not asked again


def test_a_job_that_asked_nothing_binds_nobody(data, monkeypatch):
    with FakeLlm() as fake:
        with monkeypatch.context() as patch, pytest.raises(InputError, match="OPENAI_API_KEY"):
            patch.setattr("data_prep.llm_client._is_own_network", lambda _: False)
            patch.delenv("OPENAI_API_KEY")
            rank(data, fake)
        assert rank(data, fake, "--temperature", 0.5) == 0


def test_changed_texts_are_noticed(data):
    with FakeLlm() as fake:
        rank(data, fake)
        asked = len(fake.bodies)
        corpus = data / "collection" / "corpus.jsonl"
        corpus.write_text(corpus.read_text().replace("q7 2 is", "q7 2 was"))
        with pytest.raises(InputError, match=r"other settings \(texts was 'sha256 \w+, is 'sha256"):
            rank(data, fake)
        assert len(fake.bodies) == asked


def test_a_second_process_on_the_same_output_is_refused(data):
    with open(data / "teacher.run.journal.jsonl", "ab") as held, FakeLlm() as fake:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is at work on this output"):
            rank(data, fake)
        assert fake.bodies == []


PRICES = ("--price-input", 10_000, "--price-output", 1_000)  # the server bills 100 and 10 tokens: 1.01 a window


@pytest.mark.parametrize("limit", [("--max-cost", 12), ("--max-tokens", 1400)])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_limits_are_never_passed_and_the_job_goes_on_under_a_higher_one(data, limit, concurrency, capsys):
    flags = ("--prompt", "single_message", "--max-answer-tokens", 150, "--system", "", "--concurrency", concurrency)
    with FakeLlm() as fake:
        assert rank(data, fake, *flags, *PRICES, *limit) == 4
        asked = len(fake.bodies)
        assert "Run the same command with a higher limit to go on" in capsys.readouterr().err
        assert 0 < asked * 1.01 <= 12
        assert 0 < asked * 110 <= 1400
        assert asked >= 2
        assert not (data / "teacher.run").exists()
        assert rank(data, fake, *flags, *PRICES, *limit) == 4  # earlier sessions count
        assert len(fake.bodies) == asked
        assert rank(data, fake, *flags) == 0
        assert len(fake.bodies) == WINDOWS


def test_a_dry_run_asks_and_writes_nothing(data, capsys):
    before = sorted(data.iterdir())
    assert rank(data, None, "--dry-run", *PRICES) == 0
    out = capsys.readouterr().out
    assert f"windows to ask          {WINDOWS}" in out
    assert "cost                    " in out
    assert sorted(data.iterdir()) == before


def test_added_relevant_passages_and_what_is_left_out(data, capsys):
    with open(data / "first.run", "a") as run:
        run.write("q7 Q0 no-text 8 1 first\nunknown Q0 q7-1 1 1 first\n")
    with FakeLlm() as fake:
        assert rank(data, fake, "--add-relevant") == 0
    out = capsys.readouterr().out
    assert "1 of them added as relevant" in out
    assert "left out 1 queries: the collection has no text for them" in out
    assert "left out 1 passages: the collection has no text for them" in out
    assert orders(data)["q25"][0] == "extra"
    assert len(orders(data)["q25"]) == 26
    assert "unknown" not in orders(data)


def test_structured_output_binds_the_answer(data):
    with FakeLlm() as fake:
        assert rank(data, fake, "--structured-output") == 0
    schema = fake.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["ranking"]["items"] == {"type": "integer"}
    assert '{"ranking": [...]}' in fake.bodies[0]["messages"][-1]["content"]


def test_passages_are_cut_to_the_context(data):
    with FakeLlm() as fake:
        assert rank(data, fake, "--context-tokens", 1024, "--max-answer-tokens", 100) == 0
        for body in fake.bodies:
            tokens = sum(-(-len(message["content"].encode()) // 4) + 4 for message in body["messages"])
            assert tokens + 100 <= 1024
        with pytest.raises(InputError, match=r"--context-tokens 300: .* do not fit"):
            rank(data, fake, "--context-tokens", 300, output="tight.run")


def test_batches_in_rounds_give_the_run_of_direct_requests(data, capsys):
    with FakeLlm() as fake:
        assert rank(data, fake, output="direct.run") == 0
        rounds = 0
        while not (data / "teacher.run").exists():
            assert rank(data, fake, "--batch", "submit") == 0
            batch_id = f"batch-{rounds}"
            rounds += 1
            with pytest.raises(InputError, match="still out"):
                rank(data, fake, "--batch", "submit")
            with pytest.raises(InputError, match="still out"):
                rank(data, fake)
            assert rank(data, fake, "--batch", "collect") == 0
            assert "not finished yet" in capsys.readouterr().out
            fake.run_batch(batch_id, fail=(2,) if rounds == 2 else ())
            assert rank(data, fake, "--batch", "status") == 0
            assert f"batch {batch_id}: completed" in capsys.readouterr().out
            assert rank(data, fake, "--batch", "collect") == 0
        assert rounds == 9 + 1  # the longest list's windows, of which one failed and was sent again
    assert (data / "teacher.run").read_bytes() == (data / "direct.run").read_bytes()


def test_a_batch_whose_reply_was_lost_is_found_again(data, capsys):
    with FakeLlm() as fake:
        fake.lose_batch_reply = True
        with pytest.raises(InputError, match="cannot be reached"):
            rank(data, fake, "--batch", "submit")
        with pytest.raises(InputError, match="a batch may have been sent .*; --batch status finds that out"):
            rank(data, fake)
        assert fake.bodies == []
        fake.lose_batch_reply = False
        with pytest.raises(InputError, match="batch-0 is still out"):
            rank(data, fake, "--batch", "submit")
        assert len(fake.batches) == 1


def test_help_is_quick_because_torch_and_openai_are_not_imported():
    code = "import sys, data_prep.rank_gpt; print(sorted({'torch', 'openai', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--stride", 21), "--stride 21 is larger than --window-size 20"),
        (("--window-size", 1), "at least 2"),
        (("--max-cost", 1), "needs --price-input"),
        (("--price-input", 1), "go together"),
        (("--qrels", "x"), "--add-relevant"),
        (("--prompt", "nowhere"), "neither rank_gpt nor single_message"),
        (("--dry-run", "--replay"), "exclude one another"),
        (("--base-url", "localhost:8000"), "an address such as"),
        (("--base-url", "http://localhost:80O0/v1"), "an address such as"),
        (("--base-url", "http://[::1/v1"), "an address such as"),
        (("--tag", " "), "are words, not blanks"),
    ],
)
def test_bad_flags_say_why(data, flags, says):
    with pytest.raises(InputError, match="is a directory; --output names the run"):
        rank(data, None, output="collection")
    with pytest.raises(InputError, match=says):
        rank(data, None, *flags)

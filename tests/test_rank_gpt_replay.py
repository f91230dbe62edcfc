"""The teacher against a server process that replays what RankVicuna answered for TREC DL 2019, faults included."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import ir_measures
import pytest

from data_prep.rank_gpt import main
from setenc_hf.trec import read_lists

SHARED = Path(os.environ.get("SETENC_SHARED") or Path(__file__).parents[2] / "shared")
DATA, SERVER = SHARED / "data/trec-dl/dl19", SHARED / "tools/replay_llm_server.py"
FIRST_STAGES = ("ada2", "bm25", "bm25-rm3", "splade-pp", "tas-b")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA.is_dir() and SERVER.is_file()), reason="the shared data is not here"),
]


@contextmanager
def replaying(first_stage, *faults):
    """Serve the recorded answers; gives the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recording = DATA / f"teacher-runs/rankvicuna-{first_stage}.responses.jsonl.gz"
    command = [sys.executable, SERVER, "--recording", recording, "--corpus", DATA / "corpus.jsonl.gz", "--port", port]
    server = subprocess.Popen([*map(str, command), *map(str, faults)], stdout=subprocess.PIPE, text=True)
    try:
        assert "replaying" in server.stdout.readline()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def stats(address):
    with urllib.request.urlopen(f"{address}/stats") as reply:
        return json.load(reply)


def argv(address, first_stage, output, *flags):
    fixed = ["--run", DATA / f"runs/{first_stage}.run", "--collection", DATA, "--output", output]
    server = ["--base-url", f"{address}/v1", "--model", "replayed-rank-vicuna"]
    return [*map(str, (*fixed, *server, *flags))]


def orders(run):
    return {query_id: [line.doc_id for line in lines] for query_id, lines in read_lists(run)}


def recorded(first_stage):
    return orders(DATA / f"teacher-runs/rankvicuna-{first_stage}.run")


@pytest.mark.parametrize("first_stage", FIRST_STAGES)
def test_the_recorded_run_comes_back_in_order(first_stage, tmp_path):
    output = tmp_path / "teacher.run"
    with replaying(first_stage) as address:
        main(argv(address, first_stage, output, "--concurrency", 16))
        paid = stats(address)["paid"]
    assert orders(output) == recorded(first_stage)
    assert len(orders(output)) == 43
    assert paid == {"windows": 387, "total": 387, "max": 1}
    if first_stage == "bm25":
        qrels = list(ir_measures.read_trec_qrels(str(DATA / "qrels.txt")))
        run = list(ir_measures.read_trec_run(str(output)))
        assert (
            round(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10], 4) == 0.6682
        )


FAULTS = ("--rate-limit", 0.1, "--server-error", 0.1, "--hang", 0.03, "--cut", 0.03, "--garble", 0.05)


def test_under_faults_the_same_run_and_nothing_paid_twice(tmp_path, capsys):
    output = tmp_path / "teacher.run"
    with replaying("bm25", *FAULTS, "--hang-seconds", 4) as address:
        main(argv(address, "bm25", output, "--concurrency", 16, "--timeout", 2.5, "--attempts", 6))
        counts = stats(address)
    assert orders(output) == recorded("bm25")
    assert counts["paid"] == {"windows": 387, "total": 387, "max": 1}
    assert 8 <= counts["max_in_flight"] <= 16 + counts["hang"]  # the server counts a hang the client has left
    for fault in ("rate_limit", "server_error", "hang", "cut", "garble"):
        assert counts[fault] > 0
    assert f"asked again (no ranking)  {counts['garble']}" in capsys.readouterr().out


def test_killed_five_times_the_same_run(tmp_path):
    output, concurrency, draw = tmp_path / "teacher.run", 8, random.Random(1)
    journal = Path(f"{output}.journal.jsonl")
    with replaying("bm25", "--latency", 0.05, "--garble", 0.05) as address:
        command = argv(address, "bm25", output, "--concurrency", concurrency, "--attempts", 6)
        for _ in range(5):
            before = journal.stat().st_size if journal.exists() else 0
            process = subprocess.Popen(
                [sys.executable, "-m", "data_prep.rank_gpt", *command], stderr=subprocess.DEVNULL
            )
            while process.poll() is None and (journal.stat().st_size if journal.exists() else 0) < before + 2_000:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.4))
            process.kill()
            assert process.wait() == -9
            assert not output.exists()
        main(command)
        paid = stats(address)["paid"]
    assert orders(output) == recorded("bm25")
    assert paid["windows"] == 387
    assert paid["total"] <= 387 + 5 * concurrency


def test_a_wrong_key_stops_after_at_most_one_request_per_worker(tmp_path):
    with replaying("bm25", "--api-key", "right") as address:
        command = [
            sys.executable,
            "-m",
            "data_prep.rank_gpt",
            *argv(address, "bm25", tmp_path / "r", "--concurrency", 16),
        ]
        environment = {**os.environ, "OPENAI_API_KEY": "wrong-and-secret"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        counts = stats(address)
    assert done.returncode == 2
    errors = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert errors == [f"error: 401: {address}/v1 refuses the key in OPENAI_API_KEY; the job was stopped"]
    assert "Traceback" not in done.stderr
    assert "wrong-and-secret" not in done.stdout + done.stderr
    assert 1 <= counts["requests"] == counts["unauthorized"] <= 16


def test_a_window_that_was_never_recorded_stops_with_one_line(tmp_path):
    with replaying("bm25") as address:
        command = [sys.executable, "-m", "data_prep.rank_gpt", *argv(address, "bm25", tmp_path / "r", "--stride", 5)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "No recording of this window of 20 passages" in done.stderr
    assert "Traceback" not in done.stderr

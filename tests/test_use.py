"""Using a model: re-ranked runs, measured runs, the pipeline, the metric, and what is loaded when."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from conftest import WORDS
from setenc_hf.errors import InputError
from setenc_hf.evaluate import main as evaluate
from setenc_hf.modeling import SetEncoderForReranking
from setenc_hf.rerank import main as rerank
from setenc_hf.scoring import QueryPassages, score_lists
from setenc_hf.tokenization import SetEncoderTokenizer
from setenc_hf.trec import read_lists
from small_collection import make_collection, make_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(backbones, tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = SetEncoderForReranking.from_pretrained(backbones["bert"], query_length=8, passage_length=20)
    torch.nn.init.normal_(model.linear.weight)
    folder = str(tmp_path_factory.mktemp("model"))
    model.save_pretrained(folder)
    return folder


def words_for(model, collection, run, output, *more):
    return ["--model", model, "--run", str(run), "--collection", str(collection), "--output", str(output), *more]


def test_rerank_writes_the_models_order_and_says_what_it_left_out(model, tmp_path, capsys):
    collection = make_collection(tmp_path / "collection")
    run = make_run(tmp_path)
    run.write_text(run.read_text() + "q0 Q0 gone 13 -1 t\nnew Q0 d1 1 1 t\n")
    qrels = collection / "qrels.txt"
    rerank(
        words_for(
            model, collection, run, tmp_path / "out.run", "--depth", "13", "--qrels", str(qrels), "--dtype", "float32"
        )
    )
    printed = capsys.readouterr().out
    assert "1  lists left out: query unknown to the collection" in printed
    assert "1  passages left out: no text in the collection" in printed
    assert "Re-ranked 6 lists (72 passages)" in printed
    assert "nDCG@10 0." in printed
    opened = SetEncoderForReranking.from_pretrained(model)
    texts = {row["doc_id"]: row["text"] for row in map(json.loads, (collection / "corpus.jsonl").open())}
    first = dict(read_lists(run))
    for query_id, lines in read_lists(tmp_path / "out.run"):
        doc_ids = [line.doc_id for line in first[query_id] if line.doc_id in texts]
        query = WORDS_OF_QUERIES[int(query_id[1:])]
        ranked = opened.rank(query, [texts[doc_id] for doc_id in doc_ids])
        assert [line.doc_id for line in lines] == [doc_ids[row["index"]] for row in ranked]
    rerank(words_for(model, collection, run, tmp_path / "two.run", "--depth", "2", "--dtype", "bfloat16"))
    assert all(len(lines) == 2 for _, lines in read_lists(tmp_path / "two.run"))
    assert "61  passages left out: below --depth" in capsys.readouterr().out


WORDS_OF_QUERIES = [word for word in WORDS.split() if len(word) > 2]


def test_rerank_refuses_what_it_cannot_do(model, backbones, tmp_path):
    collection, run = make_collection(tmp_path / "collection"), make_run(tmp_path)
    out = tmp_path / "out.run"
    with pytest.raises(InputError, match="is no Set-Encoder: its score head would be random"):
        rerank(words_for(backbones["bert"], collection, run, out))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        rerank(words_for(str(tmp_path / "nowhere"), collection, run, out))
    with pytest.raises(InputError, match="share no query"):
        (tmp_path / "other.run").write_text("x Q0 d1 1 1 t\n")
        rerank(words_for(model, collection, tmp_path / "other.run", out))
    with pytest.raises(InputError, match="no measure"):
        rerank(words_for(model, collection, run, out, "--measures", "foo"))
    with pytest.raises(InputError, match="--depth"):
        rerank(words_for(model, collection, run, out, "--depth", "0"))
    broken = SetEncoderForReranking.from_pretrained(model)
    torch.nn.init.constant_(broken.linear.weight, float("nan"))
    broken.save_pretrained(tmp_path / "diverged")
    with pytest.raises(InputError, match="query 'q0', document 'd.*': the score nan is not finite"):
        rerank(words_for(str(tmp_path / "diverged"), collection, run, out))
    with pytest.raises(ValueError, match="the score of passage 1 of 2 is nan: has the model diverged"):
        broken.rank("cat", ["life", "dog"])
    with pytest.raises(ValueError, match="the score of passage 1 of 2 is nan: has the model diverged"):
        pipeline("text-ranking", model=broken)("cat", ["life", "dog"])
    broken.config.passage_length = 300
    broken.save_pretrained(tmp_path / "long")
    with open(collection / "corpus.jsonl", "a") as corpus:
        corpus.write(json.dumps({"doc_id": "long", "text": "cat " * 300}) + "\n")
    run.write_text(run.read_text() + "q0 Q0 long 99 -99 t\n")
    with pytest.raises(InputError, match="a passage has .* tokens .* has .* positions: open the model with a lower"):
        rerank(words_for(str(tmp_path / "long"), collection, run, out))
    assert not out.exists()


def test_killing_rerank_leaves_no_run(model, tmp_path):
    collection = make_collection(tmp_path / "collection", queries=6)
    lines = [f"q{n} Q0 d{d} {d + 1} {-d} t\n" for n in range(6) for d in range(40)]
    (tmp_path / "big.run").write_text("".join(lines))
    out = tmp_path / "out.run"
    command = [sys.executable, "-m", "setenc_hf.rerank", *words_for(model, collection, tmp_path / "big.run", out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.run.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert list(tmp_path.glob(".out.run.*"))


def test_evaluate_prints_a_table_and_draws_it(shared_runs, tmp_path, capsys):
    qrels, first, better = shared_runs
    options = ["--measures", "nDCG@10", "MRR@10", "--plot", str(tmp_path / "bars.png")]
    evaluate(["--qrels", qrels, "--runs", first, better, "--names", "first", "better", *options])
    printed = capsys.readouterr().out
    assert "2 judged queries" in printed
    assert "first      0.6309\nbetter     1.0000      +0.3691" in printed
    assert "lacks 0" not in printed
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "part.run").write_text("a Q0 d1 1 1 t\nz Q0 d1 1 1 t\n")
    evaluate(["--qrels", qrels, "--runs", str(tmp_path / "part.run")])
    printed = capsys.readouterr().out
    assert "lacks 1 of 2 judged queries" in printed
    assert "1 queries without judgements" in printed
    assert " 0.5000" in printed
    (tmp_path / "other.run").write_text("z Q0 d1 1 1 t\n")
    with pytest.raises(InputError, match="shares no query"):
        evaluate(["--qrels", qrels, "--runs", str(tmp_path / "other.run")])
    with pytest.raises(InputError, match="2 names for 1 runs"):
        evaluate(["--qrels", qrels, "--runs", first, "--names", "a", "b"])


@pytest.fixture
def shared_runs(tmp_path):
    (tmp_path / "qrels").write_text("a 0 d1 1\nb 0 d1 1\n")
    (tmp_path / "first").write_text("a Q0 d2 1 2 t\na Q0 d1 2 1 t\nb Q0 d2 1 2 t\nb Q0 d1 2 1 t\n")
    (tmp_path / "better").write_text("a Q0 d1 1 2 t\na Q0 d2 2 1 t\nb Q0 d1 1 2 t\nb Q0 d2 2 1 t\n")
    return [str(tmp_path / name) for name in ("qrels", "first", "better")]


def test_ties_are_measured_in_the_runs_order_not_by_name(tmp_path, capsys):
    (tmp_path / "qrels").write_text("a 0 a 1\n")
    (tmp_path / "tied").write_text("a Q0 a 1 1 t\na Q0 z 2 1 t\n")
    evaluate(["--qrels", str(tmp_path / "qrels"), "--runs", str(tmp_path / "tied"), "--measures", "MRR@10"])
    assert " 1.0000" in capsys.readouterr().out


def test_the_pipeline(model):
    import setenc_hf  # noqa: F401

    ranker = pipeline("text-ranking", model=model)
    passages = ["blue river", "cat dog", "lamp", "life cycle of the flea"]
    expected = SetEncoderForReranking.from_pretrained(model).rank("flea", passages)
    assert ranker("flea", passages) == expected
    assert ranker(("flea", passages)) == expected
    row = {"query": "flea", "passages": passages}
    assert ranker(row) == expected
    assert ranker([row, {"query": "cat", "passages": passages[:1]}], batch_size=2)[0] == expected
    assert list(ranker(item for item in [row])) == [expected]
    assert ranker(row, top_k=2) == expected[:2]
    assert ranker({"query": "flea", "passages": []}) == []
    [hit] = ranker("flea", [{"text": "lamp", "id": "0012", "score": 99.0, "index": "d7"}])
    assert hit == {**ranker("flea", ["lamp"])[0], "id": "0012"}  # a first stage's score is not the model's
    trained = SetEncoderForReranking.from_pretrained(model).train()
    assert pipeline("text-ranking", model=trained)(row) == expected
    with pytest.raises(ValueError, match="one query is"):
        ranker([{"query": "flea"}])
    with pytest.raises(ValueError, match="a query without passages"):
        ranker("flea")


def test_the_metric_of_the_evaluate_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    evaluate_library = pytest.importorskip("evaluate")
    metric = evaluate_library.load(str(ROOT / "setenc_hf" / "ranking_measures"), cache_dir=str(tmp_path))
    predictions = [{"query_id": "a", "doc_ids": ["d2", "d1"], "scores": [1.0, 1.0]}]
    references = [{"query_id": "a", "doc_ids": ["d1"], "relevances": [1]}]
    values = metric.compute(predictions=predictions, references=references, measures=["MRR@10", "nDCG@10"])
    assert values == {"MRR@10": 0.5, "nDCG@10": pytest.approx(0.6309, abs=1e-4)}


@pytest.mark.parametrize(
    "module",
    ["data_prep.build_samples", "data_prep.retrieve", "data_prep.rank_gpt", "setenc_hf.rerank", "setenc_hf.evaluate"],
)
def test_help_needs_no_torch(module):
    code = "import sys, runpy; sys.argv = ['x', '--help']; sys.modules['torch'] = None;"
    code += f"runpy.run_module('{module}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout or "--runs" in done.stdout


def test_transformers_knows_set_encoders_whichever_is_imported_first(model):
    for first, second in (("setenc_hf", "transformers"), ("transformers", "setenc_hf")):
        code = (
            f"import {first}, {second};"
            "from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline;"
            f"print(AutoConfig.from_pretrained({model!r}).model_type, type(AutoModelForSequenceClassification"
            f".from_pretrained({model!r})).__name__, type(pipeline('text-ranking', model={model!r})).__name__)"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.split() == ["set-encoder", "SetEncoderForReranking", "TextRankingPipeline"], done.stderr


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_lists_are_scored_alike_whatever_the_batch(model, max_tokens):
    opened = SetEncoderForReranking.from_pretrained(model)
    tokenizer = SetEncoderTokenizer.from_pretrained(model)
    texts = WORDS.split()
    lists = [
        QueryPassages(str(size), "cat life", [str(n) for n in range(size)], texts[:size]) for size in (3, 1, 12, 5)
    ]
    expected = [opened(**tokenizer(item.query, item.passages)).logits[0].tolist() for item in lists]
    calls = []
    opened.register_forward_hook(lambda _module, _args, output: calls.append(len(output.logits)))
    scored = list(score_lists(opened, tokenizer, iter(lists), max_tokens))
    assert [item.scores for item in scored] == expected
    assert [item.query_id for item in scored] == ["3", "1", "12", "5"]
    assert calls == {1: [1, 1, 1, 1], 100: [2, 1, 1], 10_000: [4]}[max_tokens]

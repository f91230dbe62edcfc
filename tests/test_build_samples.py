"""From runs to listwise samples: what is kept, what is left out and said to be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_from_disk

from data_prep.build_samples import main
from setenc_hf.errors import InputError
from setenc_hf.samples import ListwiseSamples
from small_collection import make_collection, make_run


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    return make_collection(tmp_path / "collection")


def build(tmp_path, collection, run, *words, labels="relevance", output="samples"):
    main(["--run", *map(str, run), "--collection", str(collection), "--labels", labels, "--output",
          str(tmp_path / output), *words])  # fmt: skip
    return ListwiseSamples.open(tmp_path / output)


def test_samples_of_relevance(tmp_path, collection):
    (tmp_path / "a.run").write_text(
        "q0 Q0 d3 1 9 t\nq0 Q0 gone 2 8 t\nq0 Q0 d1 3 7 t\nnew Q0 d1 1 1 t\nq1 Q0 d1 1 1 t\n"
    )
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("q0 0 d1 2\nq0 0 d7 1\nq0 0 d8 0\nq9 0 d1 1\n")
    samples = build(tmp_path, collection, [tmp_path / "a.run"], "--qrels", str(qrels))
    assert samples.meta["counts"] == {
        "corpus passages": 3,
        "lists": 1,
        "lists left out: query unknown to the collection": 1,
        "lists left out: query without judgements": 1,
        "passages": 3,
        "passages left out: no text in the collection": 1,
        "passages taken as not relevant: unjudged": 1,
        "relevant passages added (not retrieved)": 1,
        "run lines read": 5,
    }
    (row,) = samples.samples
    assert samples.doc_ids(row["passages"]) == ["d3", "d1", "d7"]
    assert (row["labels"], row["ranks"], row["scores"]) == ([0, 2, 1], [1, 3, 0], [9, 7, None])
    assert (samples.list_lengths().tolist(), samples.relevant_counts().tolist()) == ([3], [2])
    assert [(q.doc_id, q.relevance) for q in samples.qrels()] == [("d1", 2), ("d7", 1), ("d8", 0)]
    assert load_from_disk(str(tmp_path / "samples" / "corpus")).column_names == ["doc_id", "text"]


def test_several_runs_make_one_list_by_best_rank(tmp_path, collection):
    (tmp_path / "a.run").write_text("q0 Q0 d1 1 9 t\nq0 Q0 d2 2 8 t\nq0 Q0 d3 3 7 t\n")
    (tmp_path / "b.run").write_text("q0 Q0 d4 1 2 t\nq0 Q0 d1 2 1 t\n")
    samples = build(tmp_path, collection, [tmp_path / "a.run", tmp_path / "b.run"], "--no-add-relevant", "--depth", "2")
    (row,) = samples.samples
    assert samples.doc_ids(row["passages"]) == ["d1", "d4", "d2"]
    assert (row["ranks"], row["scores"]) == ([1, 1, 2], [9, 2, 8])
    assert samples.meta["counts"]["run lines below depth"] == 1


@pytest.mark.parametrize(("labels", "expected"), [("rank", [3, 2, 1]), ("score", [9, 8.5, 1])])
def test_a_teacher_run_gives_its_order_or_its_scores(tmp_path, collection, labels, expected):
    (tmp_path / "a.run").write_text("q0 Q0 d1 1 9 t\nq0 Q0 d2 2 8.5 t\nq0 Q0 gone 3 7 t\nq0 Q0 d3 4 1 t\n")
    (tmp_path / "b.run").write_text("q0 Q0 d4 1 2 t\n")
    samples = build(tmp_path, collection, [tmp_path / "a.run", tmp_path / "b.run"], labels=labels)
    first, second = samples.samples
    assert (first["labels"], first["ranks"]) == (expected, [1, 2, 4])
    assert second["query_id"] == "q0"
    with pytest.raises(InputError, match="no judgements"):
        samples.qrels()


def test_equal_inputs_give_equal_bytes(tmp_path, collection):
    run = make_run(tmp_path)
    for output in ("one", "two"):
        build(tmp_path, collection, [run], output=output)
    files = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")) for name in ("one", "two")
    ]
    assert files[0] == files[1]
    for path in files[0]:
        if (tmp_path / "one" / path).is_file():
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_bad_input_leaves_nothing(tmp_path, collection):
    run = make_run(tmp_path)
    run.write_text(run.read_text() + "q0 Q0 d1 nine 1 t\n")
    with pytest.raises(InputError, match=r"first.run:73: the rank"):
        build(tmp_path, collection, [run])
    (tmp_path / "other.run").write_text("x Q0 d1 1 1 t\n")
    with pytest.raises(InputError, match="no list is left .*unknown to the collection: 1"):
        build(tmp_path, collection, [tmp_path / "other.run"])
    with pytest.raises(InputError, match="twice"):
        build(tmp_path, collection, [run, run])
    with pytest.raises(InputError, match="leave it out"):
        build(tmp_path, collection, [run], "--qrels", str(collection / "qrels.txt"), labels="rank")
    (tmp_path / "padding.run").write_text("q0 Q0 d1 1 -100 t\n")
    with pytest.raises(InputError, match=r"label -100.0 marks padding"):
        build(tmp_path, collection, [tmp_path / "padding.run"], labels="score")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collection", "first.run", "other.run", "padding.run"]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine").write_text("")
    with pytest.raises(InputError, match="not empty"):
        build(tmp_path, collection, [make_run(tmp_path)])
    with pytest.raises(InputError, match="no listwise samples"):
        ListwiseSamples.open(tmp_path / "samples")


def test_a_killed_command_leaves_nothing_that_looks_complete(tmp_path, collection):
    run = make_run(tmp_path)
    os.mkfifo(tmp_path / "slow.run")
    command = [sys.executable, "-m", "data_prep.build_samples", "--run", str(run), "--collection", str(collection)]
    command += ["--labels", "relevance", "--output", str(tmp_path / "out")]
    # the command waits for its queries in the middle of writing
    (collection / "queries.tsv").rename(tmp_path / "queries.tsv")
    os.mkfifo(collection / "queries.tsv")
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    try:
        hashed = (tmp_path / "queries.tsv").read_bytes()
        (collection / "queries.tsv").write_bytes(hashed)  # once for its hash
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.*/corpus/data*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.glob(".out.*/corpus/data*"))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_one_line_and_status_2(tmp_path, collection):
    command = [sys.executable, "-m", "data_prep.build_samples", "--run", "missing.run", "--collection", str(collection)]
    command += ["--labels", "rank", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (2, "error: missing.run: no such file\n")


def test_the_meta_file_says_where_everything_came_from(tmp_path, collection):
    samples = build(tmp_path, collection, [make_run(tmp_path)])
    meta = json.loads((samples.folder / "meta.json").read_text())
    assert len(meta["sources"]["runs"][str(tmp_path / "first.run")]) == 64
    assert meta["sources"]["collection"][str(collection)].keys() == {"corpus.jsonl", "queries.tsv", "qrels.txt"}
    assert (meta["labels"], meta["depth"]) == ("relevance", 100)

"""BM25: exact scores, ties, ids as text, resume to the same bytes, and the figures of pyserini 1.6.0."""

import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.analysis import open_analyzer
from data_prep.bm25 import Bm25Searcher
from data_prep.bm25_index import LENGTHS, build_bm25
from data_prep.index_files import one_builder
from data_prep.retrieve import main
from data_prep.run_blocks import search_in_blocks
from setenc_hf.collection import open_collection
from setenc_hf.errors import InputError
from setenc_hf.trec import read_lists, read_qrels

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SETENC_SHARED", Path(__file__).parents[2] / "shared"))
DL19 = SHARED / "data" / "trec-dl" / "dl19"
needs_dl19 = pytest.mark.skipif(not DL19.is_dir(), reason="the TREC DL 2019 passages are not here")


def write_collection(folder, passages, queries):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"doc_id": doc_id, "text": text}) + "\n" for doc_id, text in passages.items()]
    (folder / "corpus.jsonl").write_text("".join(rows))
    (folder / "queries.tsv").write_text("".join(f"{query_id}\t{text}\n" for query_id, text in queries.items()))
    return folder


def build(tmp_path, passages, **options):
    collection = open_collection(str(write_collection(tmp_path / "collection", passages, {"q": "x"})))
    (tmp_path / "index").mkdir(exist_ok=True)
    build_bm25(collection, tmp_path / "index", **options)
    return Bm25Searcher(tmp_path / "index")


def command(tmp_path, collection, *more, name="a"):
    return ["--collection", str(collection), "--retriever", "bm25", "--index-dir", str(tmp_path / f"index-{name}"),
            "--output", str(tmp_path / f"{name}.run"), *more]  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_lengths_are_lucenes_bytes():
    assert LENGTHS[:41].tolist() == [*range(40), 42 - 2]
    assert LENGTHS[[40, 47, 48, 56, 255]].tolist() == [40, 54, 56, 88, 2013265944]
    assert (np.diff(LENGTHS) > 0).all()


def test_scores_are_those_of_the_formula(tmp_path):
    passages = {"a": "green river stone", "b": "river river boat", "c": "green paper lamp flower", "e": "the"}
    searcher = build(tmp_path, passages)
    average = 10 / 3  # the passage of a stop word alone holds no term and is not counted

    def weight(df, tf, length):
        return math.log(1 + (3 - df + 0.5) / (df + 0.5)) * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * length / average))

    expected = {
        "b": weight(2, 2, 3) + weight(1, 1, 3),
        "a": weight(2, 1, 3) + 2 * weight(2, 1, 3),
        "c": 2 * weight(2, 1, 4),
    }
    ranked = searcher.search("green rivers boats greens", depth=10)
    assert dict(ranked) == pytest.approx(expected, rel=1e-6)
    assert [doc_id for doc_id, _ in ranked] == sorted(expected, key=expected.get, reverse=True)
    assert searcher.search("the unknown", depth=10) == []


def test_a_second_builder_waits_and_finds_the_index(tmp_path, capsys):
    passages = {str(number): f"river stone{number}" for number in range(50)}
    collection = open_collection(str(write_collection(tmp_path / "collection", passages, {"q": "x"})))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    build_bm25(collection, alone, range_docs=7)
    with ThreadPoolExecutor(2) as threads:
        with one_builder(shared):
            builders = [threads.submit(build_bm25, collection, shared, range_docs=7) for _ in range(2)]
            said, deadline = "", time.monotonic() + 30
            while said.count("another process is building this index; waiting") < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
                said += capsys.readouterr().err
            assert contents(shared).keys() == {".lock"}
        for builder in builders:
            builder.result()
    assert said.count("another process is building this index; waiting") == 2
    assert contents(shared) == contents(alone)


def test_of_several_processes_one_indexes_and_searches(tmp_path, monkeypatch):
    collection = write_collection(tmp_path / "c", {"d": "river"}, {"q": "river"})
    monkeypatch.setenv("RANK", "1")
    main(command(tmp_path, collection))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_ties_are_in_order_of_id_at_the_cut_too(tmp_path):
    searcher = build(tmp_path, {f"{number:03d}": "river" for number in random.Random(1).sample(range(200), 200)})
    assert [doc_id for doc_id, _ in searcher.search("river", depth=7)] == [f"{number:03d}" for number in range(7)]


def test_depth_only_cuts(tmp_path):
    words = ["green", "river", "stone", "paper", "lamp", "boat", "flower", "water"]
    draw = random.Random(3)
    searcher = build(tmp_path, {str(row): " ".join(draw.choices(words, k=draw.randint(1, 9))) for row in range(300)})
    for query in ("green", "green river", "lamp lamp boat water stone"):
        full = searcher.search(query, depth=300)
        assert all(searcher.search(query, depth) == full[:depth] for depth in (1, 2, 10, 50, 299))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["0012", "12", "1e5", "NaN", "D-1/3", "null", "true", "é", "\u6771", "Q0"]),
        unique=True,
        min_size=1,
    )
)
def test_ids_are_text(tmp_path_factory, doc_ids):
    tmp_path = tmp_path_factory.mktemp("ids")
    collection = write_collection(tmp_path / "c", dict.fromkeys(doc_ids, "river"), {"007": "rivers", "1e3": "river"})
    main(command(tmp_path, collection))
    lists = {found.query_id: [line.doc_id for line in found.lines] for found in read_lists(tmp_path / "a.run")}
    assert lists == {"007": sorted(doc_ids), "1e3": sorted(doc_ids)}


FILES = {
    "corpus.jsonl": b'{"doc_id": "d1", "text": "green river"}\n{"_id": "d2", "title": "boats", "text": "river"}\n',
    "corpus.tsv": b"d1\tgreen river\nd2\triver boats\n",
    "corpus.jsonl.gz": gzip.compress(b'{"doc_id": "d1", "text": "green river"}\n', mtime=0),
    "queries.tsv": b"q1\triver\nq2\tboats\n",
    "queries.jsonl": b'{"query_id": "q1", "text": "river"}\n{"_id": "q2", "text": "boats"}\n',
    "ids.txt": b"q1 Q0 d1 1 2.5 tag\nq2\n",
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_collections_and_queries_give_a_run_or_one_line(tmp_path_factory, data):
    tmp_path = tmp_path_factory.mktemp("fuzz")
    corpus = data.draw(st.sampled_from([name for name in FILES if name.startswith("corpus")]))
    queries = data.draw(st.sampled_from(["queries.tsv", "queries.jsonl"]))
    (tmp_path / "c").mkdir()
    for name in (corpus, queries, "ids.txt"):
        (tmp_path / "c" / name).write_bytes(FILES[name])
    damaged = tmp_path / "c" / data.draw(st.sampled_from([corpus, queries, "ids.txt"]))
    content = bytearray(damaged.read_bytes())
    part = st.one_of(
        st.binary(max_size=5), st.sampled_from([b"\n", b"\t", b'"', b"}", b"\x00", b"\xff", b"\xe2\x80\xa8"])
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 5))] = data.draw(part)
    damaged.write_bytes(content)
    given = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    message = ""
    try:
        main(command(tmp_path, tmp_path / "c", "--query-ids", str(tmp_path / "c" / "ids.txt"), "--num-proc", "1"))
    except InputError as error:
        message = str(error)
    if message:
        whole = (
            "holds no passage",
            "holds no query",
            "no passage shares a term",
            "stands 2 times",
            "holds a term to index",
        )
        assert re.search(r"/c/[a-z.]+:\d+: ", message) or any(part in message for part in whole)
        assert "\n" not in message.strip()
        left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - given
        assert all(path.parts[0] == "index-a" for path in left)  # what was indexed before the damage was met
        assert not (tmp_path / "index-a" / "index.json").exists() or "no passage shares" in message
    else:
        lists = list(read_lists(tmp_path / "a.run"))
        known = dict.fromkeys(doc.doc_id for doc in open_collection(str(tmp_path / "c")).docs())
        assert lists
        assert all(line.doc_id in known for found in lists for line in found.lines)


def test_an_id_twice_is_refused(tmp_path):
    folder = write_collection(tmp_path / "c", {"a": "river", "b": "boat"}, {"q": "river"})
    with open(folder / "corpus.jsonl", "a") as corpus:
        corpus.write(json.dumps({"doc_id": "a", "text": "lamp"}) + "\n")
    with pytest.raises(InputError, match=r"document 'a' stands 2 times .* \(passages 1 and 3\)"):
        main(command(tmp_path, folder))


def test_an_index_of_other_settings_or_passages_is_refused(tmp_path):
    folder = write_collection(tmp_path / "c", {"a": "river"}, {"q": "river"})
    main(command(tmp_path, folder))
    with pytest.raises(InputError, match="made with analyzer 'english', this command has 'standard'"):
        main(command(tmp_path, folder, "--analyzer", "standard"))
    index = tmp_path / "index-a" / "index.json"
    index.write_text(index.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(InputError, match="made with version 99, this command has 1"):
        main(command(tmp_path, folder))
    index.write_text(index.read_text().replace('"version": 99', '"version": 1'))
    write_collection(folder, {"a": "boat"}, {"q": "river"})
    with pytest.raises(InputError, match="made with source"):
        main(command(tmp_path, folder))


def test_what_cannot_work_leaves_nothing(tmp_path):
    folder = write_collection(tmp_path / "c", {"a": "river"}, {"q": "river"})
    for options, line in (
        (["--analyzer", "porter"], "--analyzer is one of english, standard, whitespace, got 'porter'"),
        (["--b", "3"], "--b between 0 and 1, got 0.9 and 3"),
        (["--k1", "nan"], "--k1 is at least 0"),
        (["--memory", "4XB"], "a size is a number with KB, MB or GB"),
        (["--depth", "0"], "--depth is at least 1, got 0"),
        (["--index-dir", str(folder / "corpus.jsonl")], "corpus.jsonl: is a file; --index-dir names a folder"),
    ):
        with pytest.raises(InputError, match=re.escape(line)):
            main([*command(tmp_path, folder), *options])
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_query_ids_choose_queries_in_their_order(tmp_path):
    folder = write_collection(tmp_path / "c", {"a": "river boat"}, {"1": "river", "2": "boat", "3": "lamp"})
    (tmp_path / "ids").write_text("3\n2\n\n1\n2\n")
    main(command(tmp_path, folder, "--query-ids", str(tmp_path / "ids")))
    assert [found.query_id for found in read_lists(tmp_path / "a.run")] == ["2", "1"]  # 3 has no hit
    (tmp_path / "ids").write_text("1\n9\n")
    with pytest.raises(InputError, match="ids:2: query '9' is not in"):
        main(command(tmp_path, folder, "--query-ids", str(tmp_path / "ids")))


def test_blocks_left_by_a_command_of_other_settings_are_not_used(tmp_path):
    def search(block):
        return [(query_id, [(f"{query_id}-passage", 1.0)]) for query_id, _ in block]

    def search_and_die(block):
        if block[0][0] == "2":
            raise KeyboardInterrupt
        return [(query_id, [("old", 1.0)]) for query_id, _ in block]

    output, queries = tmp_path / "a.run", [(str(number), "river") for number in range(4)]

    def lists_after(depth):
        with pytest.raises(KeyboardInterrupt):
            search_in_blocks(output, queries, search_and_die, {"depth": 5}, "t", block_size=1)
        assert not output.exists()
        assert search_in_blocks(output, queries, search, {"depth": depth}, "t", block_size=1) == (4, 0, 4)
        found = [ranked.lines[0].doc_id for ranked in read_lists(output)]
        output.unlink()
        return found

    assert lists_after(5) == ["old", "old", "2-passage", "3-passage"]  # what was done is kept
    assert lists_after(6) == [f"{number}-passage" for number in range(4)]


def test_no_hit_at_all_leaves_no_run(tmp_path):
    folder = write_collection(tmp_path / "c", {"a": "river"}, {"1": "lamp"})
    with pytest.raises(InputError, match="no passage shares a term with any of the 1 queries"):
        main(command(tmp_path, folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "index-a"]


def test_the_index_does_not_depend_on_ranges_and_processes(tmp_path):
    words = [f"word{number}" for number in range(50)]
    draw = random.Random(5)
    passages = {str(row): " ".join(draw.choices(words, k=draw.randint(0, 9))) for row in range(100)}
    build(tmp_path / "one", passages)
    build(tmp_path / "many", passages, range_docs=13, num_proc=2)
    assert contents(tmp_path / "one" / "index") == contents(tmp_path / "many" / "index")


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path):
    draw = random.Random(7)
    words = [f"w{number}" for number in range(2000)]
    passages = {str(row): " ".join(draw.choices(words, k=60)) for row in range(8000)}
    queries = {str(row): " ".join(draw.choices(words, k=12)) for row in range(3000)}
    folder = write_collection(tmp_path / "c", passages, queries)
    start = [sys.executable, "-m", "data_prep.retrieve"]
    options = ["--memory", "1MB", "--num-proc", "1", "--depth", "20"]
    subprocess.run([*start, *command(tmp_path, folder, *options, name="whole")], cwd=ROOT, check=True)
    for begun in (tmp_path / "index-cut" / "parts" / "000001", tmp_path / ".cut.run.blocks" / "000000000.run"):
        process = subprocess.Popen([*start, *command(tmp_path, folder, *options, name="cut")], cwd=ROOT)
        while not begun.exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "cut.run").exists()
    subprocess.run([*start, *command(tmp_path, folder, *options, name="cut")], cwd=ROOT, check=True)
    assert contents(tmp_path / "index-cut") == contents(tmp_path / "index-whole")
    assert (tmp_path / "cut.run").read_bytes() == (tmp_path / "whole.run").read_bytes()
    assert not (tmp_path / ".cut.run.blocks").exists()


def test_help_is_quick_and_bad_input_is_one_line(tmp_path):
    code = "import sys, data_prep.retrieve as r; r.parser().format_help(); print([m for m in ('torch', 'transformers', "
    code += "'nltk', 'datasets') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"
    asked = [sys.executable, "-m", "data_prep.retrieve", *command(tmp_path, tmp_path / "none")]
    result = subprocess.run(asked, cwd=ROOT, text=True, capture_output=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: ")


@pytest.fixture(scope="module")
def dl19(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dl19")
    main(command(folder, DL19))
    figures = json.loads((ROOT / "tests" / "fixtures" / "dl19_bm25.json").read_text())
    return figures, {found.query_id: found.lines for found in read_lists(folder / "a.run")}


@needs_dl19
def test_dl19_scores_are_pyserinis(dl19):
    figures, run = dl19
    assert {query_id: len(lines) for query_id, lines in run.items()} == figures["hits"]
    compared = agreed = 0
    for query_id, scores in figures["scores"].items():
        for rank, (doc_id, score) in scores.items():
            line = run[query_id][int(rank) - 1]
            compared += 1
            agreed += line.doc_id == doc_id and abs(line.score - score) < 1e-3
    assert compared > 450
    assert agreed / compared >= 0.999


@needs_dl19
def test_dl19_measures_are_pyserinis(dl19):
    import ir_measures

    figures, run = dl19
    qrels = [ir_measures.Qrel(q.query_id, q.doc_id, q.relevance) for q in read_qrels(DL19 / "qrels.txt")]
    scored = [ir_measures.ScoredDoc(line.query_id, line.doc_id, line.score) for lines in run.values() for line in lines]
    measures = [ir_measures.parse_measure(name) for name in figures["measures"]]
    found = ir_measures.calc_aggregate(measures, qrels, scored)
    assert {str(measure): round(value, 4) for measure, value in found.items()} == figures["measures"]


@needs_dl19
def test_dl19_terms_are_lucenes(dl19):
    figures, _ = dl19
    analyzer = open_analyzer("english")
    queries = open_collection(str(DL19)).queries()
    assert {query_id: analyzer.terms(text) for query_id, text in queries.items()} == figures["query_terms"]
    sums = bytes.fromhex(figures["passage_terms_crc8"])
    with gzip.open(DL19 / "corpus.jsonl.gz", "rt") as corpus:
        texts = [json.loads(line)["text"] for line in corpus]
    equal = sum(zlib.crc32(" ".join(analyzer.terms(text)).encode()) & 255 == found for text, found in zip(texts, sums))
    assert len(texts) == len(sums)
    assert equal / len(texts) >= 0.997

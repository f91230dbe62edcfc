"""Whatever stands in a run, qrels or a collection: what a plain reader makes of it, or one line that names the line."""

import contextlib
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.build_samples import main
from setenc_hf.collection import open_collection
from setenc_hf.errors import InputError
from setenc_hf.run_columns import read_columns
from setenc_hf.samples import ListwiseSamples
from setenc_hf.trec import read_lists, read_qrels, read_run

SETTINGS = settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RUN = b"q1 Q0 0012 1 2.5 t\nq1 Q0 12 2 1e0 t\nq2 Q0 1e5 1 -3 t\nq2 Q0 NaN 2 -4 t\n"
PIECES = [b" ", b"\t", b"\n", b"\r", b"\r\n", b"\x0b", b"\x1c", b"\x85", "\u00a0".encode(), "\u2028".encode(), b"\xff",
          b"\xef\xbb\xbf", b"0x1F", b"-0X2", b"+3", b"1_0", b"nan", b"inf", b"1e39", b"1e400", b"1e-400", b"9" * 25,
          b'"', b"'", b"\\", b"\x00", b"0012", "é".encode(), "\u0661".encode(), b",", b""]  # fmt: skip


def outcome(read):
    """Return what a reader gives, or where and what it complains about."""
    try:
        return list(read())
    except InputError as raised:
        error = str(raised)
    assert "\n" not in error
    assert re.search(r"\w+\.\w+(:\d+)?: ", error)
    return error


@st.composite
def mutated(draw, content):
    """Bytes with some pieces put in, in place of others or between them."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 2))] = draw(st.sampled_from(PIECES) | st.binary(max_size=2))
    return bytes(content)


@SETTINGS
@given(content=mutated(RUN * 2), block=st.integers(1, 120))
def test_columns_are_what_the_plain_reader_reads(tmp_path, content, block):
    path = tmp_path / "a.run"
    path.write_bytes(content)
    columns = outcome(lambda: [row for t in read_columns(path, block) for row in zip(*t.to_pydict().values())])
    assert columns == outcome(lambda: map(tuple, read_run(path)))


def test_every_odd_piece_at_every_place_of_a_line_and_every_gap(tmp_path):
    path = tmp_path / "a.run"
    line = b"q1 Q0 d 1 2 t\n"
    places = range(len(line) + 1)
    odd = [line[:start] + piece + line[start:] for piece in PIECES for start in places]
    odd += [line[:start] + line[end:] for start in places for end in places[start:]]
    for content in [bytes_ for piece in odd for bytes_ in (piece + b"q0 Q0 d 1 2 t\n", b"q0 Q0 d 1 2 t\n" + piece)]:
        path.write_bytes(content)
        columns = outcome(lambda: [row for t in read_columns(path) for row in zip(*t.to_pydict().values())])
        assert columns == outcome(lambda: map(tuple, read_run(path))), content


@SETTINGS
@given(content=mutated(b"q1 0 d1 2\nq1 3 d2 -1\n0012 0 1e5 1\n"))
def test_qrels_are_read_or_refused_by_line(tmp_path, content):
    (tmp_path / "qrels.txt").write_bytes(content)
    read = outcome(lambda: read_qrels(tmp_path / "qrels.txt"))
    if isinstance(read, list):
        words = content.decode().split()
        assert all(qrel.doc_id in words and qrel.query_id in words for qrel in read)


@SETTINGS
@given(content=mutated(b'{"doc_id": "0012", "text": "a b"}\n{"_id": "1e5", "title": "c", "text": "d"}\n'))
def test_collections_are_read_or_refused_by_line(tmp_path, content):
    (tmp_path / "corpus.jsonl").write_bytes(content)
    read = outcome(lambda: open_collection(str(tmp_path)).docs())
    if isinstance(read, list):
        assert all(isinstance(doc.doc_id, str) and len(doc.doc_id.split()) == 1 for doc in read)


def plain_samples(runs, docs, queries, qrels, labels, depth, add):
    """Make samples the slow way: a dictionary a list."""
    counts, lists = Counter(), {}
    merge = labels == "relevance"
    judged = {}
    for query_id, doc_id, grade in qrels:
        grades = judged.setdefault(query_id, {})
        grades[doc_id] = max(grade, grades.get(doc_id, grade))
    for number, path in enumerate(runs):
        for query_id, lines in read_lists(path):
            counts["run lines read"] += len(lines)
            counts["run lines below depth"] += len(lines[depth:])
            found = lists.setdefault((query_id, 0 if merge else number), [])
            found += [(rank, line.doc_id, line.score) for rank, line in enumerate(lines[:depth], 1)]
    samples = []
    for (query_id, _), found in lists.items():
        best = {}
        for rank, doc_id, score in sorted(found, key=lambda row: row[0]):
            counts["run lines merged (same passage in several runs)"] += doc_id in best
            best.setdefault(doc_id, (rank, score))
        for doc_id, grade in judged.get(query_id, {}).items() if merge and add else ():
            if grade > 0 and doc_id not in best:
                counts["relevant passages added (not retrieved)"] += 1
                best[doc_id] = (0, None)
        kept = {doc_id: place for doc_id, place in best.items() if doc_id in docs}
        if query_id not in queries or (merge and query_id not in judged) or not kept:
            continue
        grades = {
            "relevance": [max(judged.get(query_id, {}).get(d, 0), -9) for d in kept],
            "rank": [len(kept) - n for n in range(len(kept))],
            "score": [score for _, score in kept.values()],
        }[labels]
        samples.append((query_id, list(kept), grades, [r for r, _ in kept.values()], [s for _, s in kept.values()]))
    return samples, {name: count for name, count in counts.items() if count}


ids = st.sampled_from(["0012", "12", "1e5", "NaN", "é", "-0", "d1", "d2", "d3"])
run_lines = st.lists(st.tuples(ids, ids, st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=40,
                     unique_by=lambda line: line[:2])  # fmt: skip


@SETTINGS
@given(
    runs=st.lists(run_lines, min_size=1, max_size=3),
    docs=st.sets(ids),
    queries=st.sets(ids),
    qrels=st.lists(st.tuples(ids, ids, st.integers(-1, 3)), min_size=1, max_size=20),
    labels=st.sampled_from(["relevance", "rank", "score"]),
    depth=st.sampled_from([1, 3, 100]),
    add=st.booleans(),
    size=st.sampled_from([1, 2, 1024]),
)
def test_samples_are_what_the_slow_way_makes(
    tmp_path, monkeypatch, runs, docs, queries, qrels, labels, depth, add, size
):
    monkeypatch.setattr("data_prep.run_spill.LISTS_PER_BUCKET", size)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"doc_id": d, "text": f"of {d}"}) + "\n" for d in docs))
    (tmp_path / "queries.tsv").write_text("".join(f"{q}\tasks {q}\n" for q in queries))
    (tmp_path / "qrels.txt").write_text("".join(f"{q} 0 {d} {grade}\n" for q, d, grade in qrels))
    paths = [tmp_path / f"{number}.run" for number in range(len(runs))]
    for path, lines in zip(paths, runs):
        path.write_text("".join(f"{q} Q0 {d} {rank} {score} t\n" for q, d, rank, score in lines))
    expected, counts = plain_samples(paths, docs, queries, qrels, labels, depth, add)
    words = ["--run", *map(str, paths), "--collection", str(tmp_path), "--labels", labels, "--depth", str(depth)]
    words += ["--output", str(tmp_path / "out"), "--overwrite", *([] if add else ["--no-add-relevant"])]
    if not expected:
        with pytest.raises(InputError):
            main(words)
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(words)
    samples = ListwiseSamples.open(tmp_path / "out")
    rows = [
        (row["query_id"], samples.doc_ids(row["passages"]), row["labels"], row["ranks"], row["scores"])
        for row in samples.samples
    ]
    assert rows == expected
    assert counts.items() <= samples.meta["counts"].items()
    assert [row["text"] for row in samples.corpus] == [f"of {row['doc_id']}" for row in samples.corpus]


@SETTINGS
@given(content=mutated(RUN))
def test_a_build_is_whole_or_leaves_nothing(tmp_path: Path, content):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "corpus.tsv").write_text("0012\tx\n12\ty\n1e5\tz\n")
    (tmp_path / "in" / "queries.tsv").write_text("q1\ta\nq2\tb\n")
    (tmp_path / "in" / "a.run").write_bytes(content)
    words = ["--run", str(tmp_path / "in" / "a.run"), "--collection", str(tmp_path / "in"), "--labels", "rank"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        built = outcome(lambda: main([*words, "--output", str(tmp_path / "new"), "--overwrite"]) or ())
    if isinstance(built, str):
        assert not (tmp_path / "new").exists()
    else:
        samples = ListwiseSamples.open(tmp_path / "new")
        assert set(samples.corpus["doc_id"]) <= {"0012", "12", "1e5"}
        shutil.rmtree(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

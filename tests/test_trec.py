"""Runs and qrels: what comes in, what goes out, and one line for what cannot be read."""

import gzip

import numpy as np
import pytest

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.trec import Qrel, RunLine, read_lists, read_qrels, read_run, write_run

STRANGE_IDS = ["0012", "12", "1e5", "100000", "NaN", "None", "D-1/3", "-0", "true", "é"]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_run_line_is_read_as_it_stands(tmp_path):
    path = write(tmp_path / "a.run", "q1 Q0 d1 1 2.5 bm25\nq1\tQ0\td2\t2\t-1e-3\tbm25\n\n")
    assert list(read_run(path)) == [RunLine("q1", "d1", 1, 2.5, "bm25"), RunLine("q1", "d2", 2, -0.001, "bm25")]


def test_score_orders_a_list_then_rank(tmp_path):
    path = write(tmp_path / "a.run", "q Q0 c 3 1.0 t\nq Q0 a 2 1.0 t\nq Q0 b 9 7 t\np Q0 a 1 1 t\nq Q0 d 1 0 t\n")
    lists = list(read_lists(path))
    assert [(query_id, [line.doc_id for line in lines]) for query_id, lines in lists] == [
        ("q", ["b", "a", "c", "d"]),
        ("p", ["a"]),
    ]
    assert [len(lines) for _, lines in read_lists(path, depth=2)] == [2, 1]


@pytest.mark.parametrize("name", ["a.run", "a.run.gz"])
def test_strange_ids_survive_a_round_trip(tmp_path, name):
    scored = [(doc_id, float(-place)) for place, doc_id in enumerate(STRANGE_IDS)]
    write_run(tmp_path / name, [(query_id, scored) for query_id in STRANGE_IDS], "tag")
    lists = list(read_lists(tmp_path / name))
    assert [query_id for query_id, _ in lists] == STRANGE_IDS
    assert all([line.doc_id for line in lines] == STRANGE_IDS for _, lines in lists)


def test_written_scores_fall_strictly_in_float32(tmp_path):
    scored = [("a", 1.0), ("b", 1.0), ("c", 1.0 + 1e-12), ("d", 0.0), ("e", 0.0), ("f", -0.0)]
    assert write_run(tmp_path / "a.run", [("q", scored)], "t") == 6
    (lines,) = (lines for _, lines in read_lists(tmp_path / "a.run"))
    assert [line.doc_id for line in lines] == ["c", "a", "b", "d", "e", "f"]
    scores = np.array([line.score for line in lines], dtype=np.float32)
    assert (np.diff(scores) < 0).all()
    assert [line.rank for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("q Q0 d 1 1.0 t\nq Q0 e 2 0.5\n", 2, "6 columns"),
        ("q Q0 d 1 high t\n", 1, "not a number: 'high'"),
        ("q Q0 d 1 NaN t\n", 1, "not finite"),
        ("q Q0 d 1 inf t\n", 1, "not finite"),
        ("q Q0 d first 1 t\n", 1, "rank is not a whole number"),
        ("q Q0 d 1 1 t\nr Q0 d 1 1 t\nq Q0 d 2 0 t\n", 3, "'d' stands twice"),
        (b"q Q0 d 1 1 t\nq Q0 \xff 2 0 t\n", 2, "not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, line, what):
    path = write(tmp_path / "bad.run", text)
    with pytest.raises(InputError, match=f"bad.run:{line}: .*{what}"):
        list(read_lists(path))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match="holds no run line"):
        list(read_run(write(tmp_path / "empty.run", "\n \n")))
    with pytest.raises(InputError, match="no such file"):
        list(read_run(tmp_path / "missing.run"))
    with pytest.raises(InputError, match="is a directory"):
        list(read_run(tmp_path))
    lines = b"".join(b"q Q0 d%d %d %d t\n" % (n, n, -n) for n in range(2000))
    cut = write(tmp_path / "cut.run.gz", gzip.compress(lines)[:-200])
    with pytest.raises(InputError, match=r"cut.run.gz:\d+: the gzip file is damaged or cut short"):
        list(read_run(cut))
    with pytest.raises(InputError, match="gzip file is damaged"):
        list(read_run(write(tmp_path / "plain.run.gz", "q Q0 d 1 1 t\n")))


def test_a_failing_writer_leaves_the_old_run_and_no_rest(tmp_path):
    path = tmp_path / "a.run"
    write_run(path, [("q", [("old", 1.0)])], "t")

    def lists():
        yield "q", [("new", 1.0)]
        raise RuntimeError("the model ran out of memory")

    with pytest.raises(RuntimeError):
        write_run(path, lists(), "t")
    assert [line.doc_id for line in read_run(path)] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.run"]
    with pytest.raises(ValueError, match="not finite"):
        write_run(path, [("q", [("d", float("nan"))])], "t")
    with pytest.raises(InputError, match="one word"):
        write_run(path, [], "two words")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "big.run"), NotADirectoryError(20, "Not a directory", "a.run/x")]
)
def test_errors_of_the_file_system_are_one_line(error, capsys):
    def fail(_argv):
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(fail)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_qrels_in_trec_and_beir_form(tmp_path):
    trec = write(tmp_path / "q.txt", "q1 0 d1 2\nq1 3 d2 -1\n")
    assert list(read_qrels(trec)) == [Qrel("q1", "d1", 2, "0"), Qrel("q1", "d2", -1, "3")]
    beir = write(tmp_path / "q.tsv", "query-id\tcorpus-id\tscore\n0012\t1e5\t1\n")
    assert list(read_qrels(beir)) == [Qrel("0012", "1e5", 1)]
    with pytest.raises(InputError, match=r"bad.txt:1: .*4 columns"):
        list(read_qrels(write(tmp_path / "bad.txt", "q d 1\n")))
    with pytest.raises(InputError, match=r"bad.txt:1: the relevance is not a whole number: '1.5'"):
        list(read_qrels(write(tmp_path / "bad.txt", "q 0 d 1.5\n")))
    with pytest.raises(InputError, match="no judgement"):
        list(read_qrels(write(tmp_path / "none.txt", "")))

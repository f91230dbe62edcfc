"""Orders that a re-ranker must not mind."""

import pytest

from data_prep.corrupt_run import main
from setenc_hf.errors import InputError
from setenc_hf.trec import read_lists, read_qrels


def orders(path):
    return {query_id: [line.doc_id for line in lines] for query_id, lines in read_lists(path)}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.run").write_text("".join(f"q Q0 {d} {n} {-n} t\n" for n, d in enumerate("abcd")) + "r Q0 a 1 1 t\n")
    (tmp_path / "qrels.txt").write_text("q 0 b 1\nq 0 d 3\nq 0 c -1\nq 0 z 3\n")
    return tmp_path


@pytest.mark.parametrize(("order", "expected"), [("ideal", "dbac"), ("inverse-ideal", "cabd")])
def test_judged_orders_keep_the_runs_own_among_equals(files, capsys, order, expected):
    main(["--run", str(files / "a.run"), "--order", order, "--qrels", str(files / "qrels.txt"),
          "--output", str(files / "b.run")])  # fmt: skip
    assert orders(files / "b.run") == {"q": list(expected)}
    assert "1  lists left out: query without judgements" in capsys.readouterr().out


def test_a_random_order_depends_on_seed_query_and_passages_alone(files):
    lines = (files / "a.run").read_text().splitlines(keepends=True)
    (files / "turned.run").write_text("".join(line.replace(" -", " ") for line in reversed(lines)))
    for name, seed in (("a", "1"), ("turned", "1"), ("a", "2")):
        main(["--run", str(files / f"{name}.run"), "--order", "random", "--seed", seed,
              "--output", str(files / f"{name}{seed}.run")])  # fmt: skip
    assert orders(files / "a1.run") == orders(files / "turned1.run") != orders(files / "a2.run")
    with pytest.raises(InputError, match="need judgements"):
        main(["--run", str(files / "a.run"), "--order", "ideal", "--output", str(files / "b.run")])


@pytest.mark.parametrize("order", ["ideal", "inverse-ideal"])
def test_the_papers_orders_have_the_same_grades_at_every_rank(shared, tmp_path, order):
    data = shared / "data" / "trec-dl" / "dl19"
    main(["--run", str(data / "runs" / "webis-bm25-random.run"), "--order", order, "--qrels", str(data / "qrels.txt"),
          "--output", str(tmp_path / "b.run")])  # fmt: skip
    grades = {(qrel.query_id, qrel.doc_id): qrel.relevance for qrel in read_qrels(data / "qrels.txt")}
    ours, theirs = orders(tmp_path / "b.run"), orders(data / "runs" / f"webis-bm25-{order}.run")
    assert ours.keys() == theirs.keys()
    for query_id, doc_ids in ours.items():
        assert set(doc_ids) == set(theirs[query_id])
        assert [grades.get((query_id, d), 0) for d in doc_ids] == [
            grades.get((query_id, d), 0) for d in theirs[query_id]
        ]

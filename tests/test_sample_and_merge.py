"""Drawing queries of a run, and merging runs."""

import gzip

import pytest

from data_prep.merge_runs import concatenate, fuse, interpolate
from data_prep.merge_runs import main as merge
from data_prep.sample_queries import main as draw
from data_prep.sample_queries import sample
from setenc_hf.errors import InputError
from setenc_hf.trec import read_lists


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "first.run"
    lines = [f"{query:03}\tQ0 d{rank} {rank} {9 - rank}.50 tag\n" for rank in (1, 2, 3) for query in range(50)]
    path.write_text("".join(lines))
    return path


def test_lines_are_kept_as_they_are_and_in_order(run, tmp_path, capsys):
    draw(["--run", str(run), "--num-queries", "10", "--seed", "3", "--output", str(tmp_path / "out.run")])
    kept = (tmp_path / "out.run").read_text().splitlines()
    assert len(kept) == 30
    assert len({line.split()[0] for line in kept}) == 10
    assert kept == [line for line in run.read_text().splitlines() if line in set(kept)]
    assert "10 of 50 queries, 30 lines, seed 3" in capsys.readouterr().out


def test_the_seed_alone_decides(run):
    ids = [f"q{number}" for number in range(100)]
    assert sample(ids, 20, 42) == sample(ids[::-1], 20, 42)
    assert sample(ids, 20, 42) != sample(ids, 20, 43)
    assert sample(ids, 100, 1) == set(ids)


def test_strata_keep_their_shares():
    strata = {f"q{number}": "long" if number % 4 == 0 else "short" for number in range(100)}
    kept = sample(list(strata), 10, 42, strata)
    assert len(kept) == 10
    assert sum(strata[query_id] == "long" for query_id in kept) in (2, 3)
    assert len(sample(list(strata), 7, 42, strata)) == 7
    with pytest.raises(InputError, match="query 'q1' of the run is in no stratum"):
        sample(["q0", "q1"], 1, 42, {"q0": "a"})


def test_more_queries_than_there_are_is_an_error(run, tmp_path):
    with pytest.raises(InputError, match="between 1 and the run's 50 queries, got 51"):
        draw(["--run", str(run), "--num-queries", "51", "--output", str(tmp_path / "out.run")])
    assert not (tmp_path / "out.run").exists()


def test_reciprocal_rank_fusion_by_its_formula():
    fused = fuse([["a", "b", "c"], ["c", "a"]], k=60)
    assert [doc_id for doc_id, _ in fused] == ["a", "c", "b"]
    assert dict(fused) == {"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62}
    assert [doc_id for doc_id, _ in fuse([["a", "b"], ["b", "a"]])] == ["a", "b"]  # a tie keeps the first run's order


def test_concatenation_keeps_each_passage_where_it_comes_first():
    assert concatenate([["b", "a"], ["a", "c"]]) == [("b", 3.0), ("a", 2.0), ("c", 1.0)]


def test_interpolation_by_its_formula():
    first, second = {"a": 3.0, "b": 1.0}, {"c": 9.0, "b": 8.0, "d": 7.0}
    merged = interpolate([first, second], [1.0, 0.5])
    # what a list lacks has its lowest score: c and d have 1 of the first, a has 7 of the second
    assert merged == [("a", 3 + 3.5), ("c", 1 + 4.5), ("b", 1 + 4.0), ("d", 1 + 3.5)]
    assert interpolate([{"a": 2.0, "b": 1.0}, {}], [1.0, 5.0]) == [("a", 2.0), ("b", 1.0)]
    assert [doc_id for doc_id, _ in interpolate([{"a": 1.0, "b": 0.0}, {"b": 1.0, "a": 0.0}], [1, 1])] == ["a", "b"]


def test_scores_of_other_runs_are_added_to_the_first(tmp_path, capsys):
    (tmp_path / "one.run").write_text("q1 Q0 a 1 2 x\nq1 Q0 b 2 1 x\nq3 Q0 a 1 1 x\n")
    (tmp_path / "two.run").write_text("q1 Q0 c 1 9 x\nq1 Q0 b 2 8 x\nq1 Q0 d 3 4 x\nq2 Q0 a 1 7 x\n")
    words = ["--runs", str(tmp_path / "one.run"), str(tmp_path / "two.run"), "--output", str(tmp_path / "out.run")]
    merge([*words, "--method", "linear", "--weights", "1", "0.5", "--first-only"])
    lists = {query_id: [(line.doc_id, line.score) for line in lines] for query_id, lines in read_lists(words[-1])}
    assert lists == {"q1": [("b", 5.0), ("a", 4.0)], "q3": [("a", 1.0)]}
    assert "2 queries, 1 of them in every run, 3 lines; left out 3 passages" in capsys.readouterr().out
    merge([*words, "--method", "linear", "--depth", "1"])
    assert [query_id for query_id, _ in read_lists(words[-1])] == ["q1", "q3", "q2"]
    with pytest.raises(InputError, match="a number for each of the 2 runs, got"):
        merge([*words, "--method", "linear", "--weights", "1"])
    with pytest.raises(InputError, match="belongs to --method linear"):
        merge([*words, "--weights", "1", "2"])


def test_runs_of_different_queries_come_together(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.run_spill.LISTS_PER_BUCKET", 1)
    (tmp_path / "one.run").write_text("q1 Q0 a 1 2 x\nq1 Q0 b 2 1 x\n")
    with gzip.open(tmp_path / "two.run.gz", "wt") as two:
        two.write("q2 Q0 c 1 2 x\nq1 Q0 b 1 9 x\n")
    runs = ["--runs", str(tmp_path / "one.run"), str(tmp_path / "two.run.gz")]
    merge([*runs, "--output", str(tmp_path / "out.run"), "--depth", "1"])
    assert [(query_id, [line.doc_id for line in lines]) for query_id, lines in read_lists(tmp_path / "out.run")] == [
        ("q1", ["b"]),
        ("q2", ["c"]),
    ]
    assert "2 queries, 1 of them in every run, 2 lines" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.run", "out.run", "two.run.gz"]
    with pytest.raises(InputError, match="at least two"):
        merge(["--runs", str(tmp_path / "one.run"), "--output", str(tmp_path / "out.run")])

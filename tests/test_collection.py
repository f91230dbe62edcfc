"""Collections by one string: our own layout, BEIR's, and what is wrong with a folder."""

import gzip
import json

import pytest

from setenc_hf.collection import open_collection
from setenc_hf.errors import InputError
from setenc_hf.trec import Qrel


def test_our_own_layout(tmp_path):
    rows = [{"doc_id": "0012", "text": "a"}, {"doc_id": "1e5", "title": "T", "text": "b"}, {"doc_id": 12, "text": "c"}]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "queries.tsv").write_text("q1\twhat is it\n0001\tand that\n")
    (tmp_path / "qrels.txt").write_text("q1 0 0012 1\n")
    (tmp_path / "qrels.novelty.txt").write_text("q1 7 0012 1\n")
    collection = open_collection(str(tmp_path))
    assert [tuple(doc) for doc in collection.docs()] == [("0012", "a"), ("1e5", "T b"), ("12", "c")]
    assert collection.texts({"1e5", "12", "none"}) == {"1e5": "T b", "12": "c"}
    assert collection.queries() == {"q1": "what is it", "0001": "and that"}
    assert collection.qrels() == [Qrel("q1", "0012", 1)]
    assert set(collection.sources()) == {"corpus.jsonl.gz", "queries.tsv", "qrels.txt", "qrels.novelty.txt"}


def test_the_layout_of_beir(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "a"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "b"}\n')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    collection = open_collection(str(tmp_path))
    assert (collection.texts(["d1"]), collection.queries()) == ({"d1": "a"}, {"q1": "b"})
    assert collection.qrels() == [Qrel("q1", "d1", 1)]
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    with pytest.raises(InputError, match=r"several sets of judgements \(qrels/dev.tsv, qrels/test.tsv\)"):
        collection.qrels()


def test_corpus_tsv(tmp_path):
    (tmp_path / "corpus.tsv").write_text('d1\t"a" quoted\nd2\tb\n')
    assert open_collection(str(tmp_path)).texts(["d1", "d2"]) == {"d1": '"a" quoted', "d2": "b"}


@pytest.mark.parametrize(
    ("corpus", "what"),
    [
        ('{"doc_id": "a", "text": "x"}\n{"doc_id": "b"\n', r"corpus.jsonl:2: not JSON"),
        ('{"doc_id": "a b", "text": "x"}\n', r"corpus.jsonl:1: `doc_id` must be text without blanks"),
        ('{"doc_id": 1.5, "text": "x"}\n', r"corpus.jsonl:1: `doc_id` must be text"),
        ('{"doc_id": "a"}\n', r"corpus.jsonl:1: `text`"),
        ("[1]\n", r"corpus.jsonl:1: not a JSON object"),
        ('{"doc_id": "a", "text": "x"}\n{"doc_id": "a", "text": "y"}\n', r"'a' stands twice"),
        ("", r"holds no passage"),
    ],
)
def test_a_broken_corpus_is_named(tmp_path, corpus, what):
    (tmp_path / "corpus.jsonl").write_text(corpus)
    with pytest.raises(InputError, match=what):
        open_collection(str(tmp_path)).texts(["a"])


def test_folders_that_are_no_collections(tmp_path):
    with pytest.raises(InputError, match="holds no corpus"):
        open_collection(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        open_collection(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="neither a folder nor an ir_datasets id"):
        open_collection("msmarco-passages/train")
    (tmp_path / "corpus.jsonl").write_text('{"doc_id": "a", "text": "x"}\n')
    (tmp_path / "corpus.tsv").write_text("a\tx\n")
    with pytest.raises(InputError, match=r"holds corpus.jsonl and corpus.tsv"):
        open_collection(str(tmp_path))


def test_an_ir_datasets_collection(tmp_path):
    """The one catalogue entry that needs no download is one registered here."""
    import ir_datasets
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import JsonlDocs, TrecQrels, TsvQueries
    from ir_datasets.util import LocalDownload  # type: ignore[attr-defined]

    (tmp_path / "docs.jsonl").write_text('{"doc_id": "0012", "text": "a"}\n{"doc_id": "b", "text": "c"}\n')
    (tmp_path / "queries.tsv").write_text("q1\twhat\n")
    (tmp_path / "qrels.txt").write_text("q1 0 b 2\n")
    source = {name: LocalDownload(tmp_path / name) for name in ("docs.jsonl", "queries.tsv", "qrels.txt")}
    name = f"setenc-test-{tmp_path.name}"
    ir_datasets.registry.register(
        name,
        Dataset(
            JsonlDocs(source["docs.jsonl"], mapping={"doc_id": "doc_id", "text": "text"}),
            TsvQueries(source["queries.tsv"]),
            TrecQrels(source["qrels.txt"], {}),
        ),
    )
    collection = open_collection(name)
    assert [tuple(doc) for doc in collection.docs()] == [("0012", "a"), ("b", "c")]
    assert collection.texts(["b", "0012", "none"]) == {"0012": "a", "b": "c"}
    assert collection.queries() == {"q1": "what"}
    assert collection.qrels() == [Qrel("q1", "b", 2)]


@pytest.mark.parametrize(
    "line",
    [
        '{"doc_id": ' + "1" * 5000 + ', "text": "t"}',
        "[" * 100_000,
        r'{"doc_id": "\ud800", "text": "t"}',
        r'{"doc_id": "a", "text": "\ud800"}',
    ],
)
def test_json_that_python_chokes_on_is_refused_by_line(tmp_path, line):
    (tmp_path / "corpus.jsonl").write_text('{"doc_id": "d", "text": "t"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"corpus\.jsonl:2: not"):
        list(open_collection(str(tmp_path)).docs())

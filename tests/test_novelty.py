"""Near-duplicates become one subtopic."""

from itertools import combinations

import pytest

from data_prep.novelty import main, subtopics
from setenc_hf.trec import read_qrels


def test_texts_of_the_same_words_share_a_subtopic_also_in_a_chain():
    texts = ["a b c d", "x y", "D c b a a!", "a b c d e", "b c d e f", "", ""]
    assert subtopics(texts, 0.8).tolist() == [1, 2, 1, 1, 3, 4, 5]
    assert subtopics(texts, 0.6).tolist() == [1, 2, 1, 1, 1, 3, 4]


def pairs(path):
    groups = {}
    for qrel in read_qrels(path):
        if qrel.relevance > 0:
            groups.setdefault((qrel.query_id, qrel.iteration), set()).add(qrel.doc_id)
    return {(query_id, *pair) for (query_id, _), docs in groups.items() for pair in combinations(sorted(docs), 2)}


def test_most_pairs_are_those_of_the_papers_judgements(shared, tmp_path):
    data = shared / "data" / "trec-dl" / "dl19"
    main(["--run", str(data / "runs" / "judged-pool-bm25.run"), "--collection", str(data), "--depth", "2000",
          "--output", str(tmp_path / "qrels.txt")])  # fmt: skip
    ours, theirs = pairs(tmp_path / "qrels.txt"), pairs(data / "qrels.novelty.txt")
    assert len(ours & theirs) / len(ours) == pytest.approx(0.852, abs=0.01)
    assert len(ours & theirs) / len(theirs) == pytest.approx(0.743, abs=0.01)

"""Soft labels for stage 1: the cosines of a bi-encoder, raised for what is judged relevant.

    python -m benchmarks.bi_encoder_teacher --model M --collection C --qrels Q --run R [R ...] --output O

A cross-encoder that starts from a sentence encoder has lost its way of scoring: the vectors of query and passage are
still good, but `[CLS]` of both together says nothing yet. A few thousand judged queries are too few to learn that from
one relevant passage each; a bi-encoder's scores say something of every passage. A passage's label is

    y = scale * cos(query, passage) + bonus * [judged relevant]

whose differences within a list are what MarginMSE learns. A softmax of y / .25, the bi-encoder's at its usual sharpness
with e^3 times the odds for a relevant passage, says less: nearly all of it lies on one passage.

Written are `O/mined.run`, for every judged query the collection's `--depth` nearest passages and the relevant ones, and
`O/retrieved.run`, for the queries of the runs what they list and the relevant ones. The model computes in bfloat16
where the processor is fast at it.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from setenc_hf.collection import open_collection, query_key
from setenc_hf.command import run_command
from setenc_hf.cpu_linear import is_bfloat16_fast
from setenc_hf.errors import InputError
from setenc_hf.trec import read_lists, read_qrels, write_run

from .bi_encoder import encode

SCALE = 5.0
BONUS = 0.75
TAG = "bi-encoder"


class Teacher:
    """Labels of passages for queries.

    Args:
        queries: query_id -> unit vector.
        doc_ids, passages: the collection's documents and their unit vectors [documents, hidden].
        relevant: query_id -> the documents that are judged relevant, for each of the queries.
    """

    def __init__(
        self,
        queries: dict[str, torch.Tensor],
        doc_ids: Sequence[str],
        passages: torch.Tensor,
        relevant: dict[str, set[str]],
    ) -> None:
        self.queries, self.doc_ids, self.passages, self.relevant = queries, doc_ids, passages, relevant
        self.places = {doc_id: place for place, doc_id in enumerate(doc_ids)}

    def nearest(self, query_id: str, depth: int) -> list[str]:
        """Return the `depth` documents of the highest cosines."""
        best = (self.passages @ self.queries[query_id]).topk(min(depth, len(self.doc_ids))).indices
        return [self.doc_ids[place] for place in best.tolist()]

    def label(self, query_id: str, doc_ids: Iterable[str]) -> list[tuple[str, float]]:
        """Return (doc_id, label) of these documents and the relevant ones, of those that the collection has."""
        relevant = self.relevant[query_id]
        known = [doc_id for doc_id in dict.fromkeys([*doc_ids, *sorted(relevant)]) if doc_id in self.places]
        cosines = (self.passages[[self.places[doc_id] for doc_id in known]] @ self.queries[query_id]).tolist()
        return [(doc_id, SCALE * cosine + BONUS * (doc_id in relevant)) for doc_id, cosine in zip(known, cosines)]


def relevant_documents(qrels: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for judgement in read_qrels(qrels):
        if judgement.relevance > 0:
            found.setdefault(judgement.query_id, set()).add(judgement.doc_id)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bi_encoder_teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a sentence encoder that takes the mean of its token vectors")
    add("--collection", required=True)
    add("--qrels", required=True, help="judgements of the queries to train on")
    add("--run", nargs="+", required=True, help="lists to label")
    add("--exclude", help="judgements of queries that are evaluated on: left out, and others with their words")
    add("--depth", type=int, default=60, help="passages mined for a query (default: %(default)s)")
    add("--length", type=int, default=256, help="tokens kept of a text (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder to write the runs to")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()

    collection = open_collection(args.collection)
    texts, relevant = collection.queries(), relevant_documents(args.qrels)
    evaluated = {judgement.query_id for judgement in read_qrels(args.exclude)} if args.exclude else set()
    excluded = {query_key(texts[query_id]) for query_id in evaluated & texts.keys()}
    judged = [query_id for query_id in texts if query_id in relevant]
    kept = [query_id for query_id in judged if query_key(texts[query_id]) not in excluded]
    if not kept:
        raise InputError(f"{args.qrels}: judges no query of {args.collection}")
    lists: dict[str, list[str]] = {}
    for run in args.run:
        for query_id, lines in read_lists(run):
            lists.setdefault(query_id, []).extend(line.doc_id for line in lines)
    passages = list(collection.docs())
    model, tokenizer = AutoModel.from_pretrained(args.model).eval(), AutoTokenizer.from_pretrained(args.model)
    bfloat16 = is_bfloat16_fast(torch.device("cpu"))
    vectors = encode(model, tokenizer, [passage.text for passage in passages], args.length, bfloat16)
    queries = dict(zip(kept, encode(model, tokenizer, [texts[query_id] for query_id in kept], args.length, bfloat16)))
    teacher = Teacher(queries, [passage.doc_id for passage in passages], vectors, relevant)

    mined = ((query_id, teacher.label(query_id, teacher.nearest(query_id, args.depth))) for query_id in kept)

    def retrieved() -> Iterator[tuple[str, list[tuple[str, float]]]]:
        for query_id, doc_ids in lists.items():
            if query_id in queries:
                yield query_id, teacher.label(query_id, doc_ids)

    for name, labelled in (("mined", mined), ("retrieved", retrieved())):
        path = args.output / f"{name}.run"
        print(f"{write_run(path, labelled, TAG):>9,}  lines to {path}")
    print(f"{len(kept):>9,}  judged queries")
    print(f"{len(judged) - len(kept):>9,}  judged queries left out: evaluated on")
    print(f"{len(lists.keys() - queries.keys()):>9,}  lists left out: evaluated on or without judgements")


if __name__ == "__main__":
    run_command(main)

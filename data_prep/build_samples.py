"""Turn TREC runs into listwise samples for training and evaluation.

    python -m data_prep.build_samples --run bm25.run --collection msmarco-passage/train/judged \
        --labels relevance --depth 200 --output data/stage1

With `relevance` the lists of a query in several runs become one, by best rank, and relevant passages that no run
retrieved are added behind it with rank 0: training may draw them, evaluation never sees them. With `rank` or `score`
every run is a teacher, and each of its lists is a sample of its own.
"""

import argparse
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from setenc_hf import __version__
from setenc_hf.collection import Collection, open_collection
from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_folder, sha256
from setenc_hf.samples import (
    FORMAT_VERSION,
    IGNORE_LABEL,
    LABEL_KINDS,
    ListwiseSamples,
    corpus_features,
    sample_features,
    write_arrow,
)
from setenc_hf.trec import Qrel, read_lists, read_qrels

NOT_RETRIEVED = 0  # the rank of a passage that was added from the judgements


class StoredList:
    """A list on its way: documents by number, ranks and scores, a few bytes a line."""

    __slots__ = ("docs", "query_id", "ranks", "scores")

    def __init__(self, query_id: str) -> None:
        self.query_id = query_id
        self.docs = array("i")
        self.ranks = array("i")
        self.scores = array("f")

    def add(self, doc: int, rank: int, score: float) -> None:
        self.docs.append(doc)
        self.ranks.append(rank)
        self.scores.append(score)


def read_runs(
    paths: Sequence[str], depth: int, merge: bool, counts: Counter
) -> tuple[list[StoredList], dict[str, int]]:
    """Read the top `depth` of every list; return them and the number given to each document.

    `merge` makes one list of a query's lists in several runs: each document once, at its best rank, with the score it
    has there, ties in the order of the runs.
    """
    numbers: dict[str, int] = {}
    lists: dict[tuple[str, int], StoredList] = {}
    for run, path in enumerate(paths):
        for query_id, lines in tqdm(read_lists(path), desc=Path(path).name, unit=" lists", disable=None):
            counts["run lines read"] += len(lines)
            counts["run lines below depth"] += max(len(lines) - depth, 0)
            stored = lists.setdefault((query_id, 0 if merge else run), StoredList(query_id))
            for rank, line in enumerate(lines[:depth], start=1):
                stored.add(numbers.setdefault(line.doc_id, len(numbers)), rank, line.score)
    if merge and len(paths) > 1:
        lists = {key: _merged(stored, counts) for key, stored in lists.items()}
    return list(lists.values()), numbers


def _merged(stored: StoredList, counts: Counter) -> StoredList:
    merged, seen = StoredList(stored.query_id), set()
    for place in sorted(range(len(stored.docs)), key=stored.ranks.__getitem__):
        doc = stored.docs[place]
        if doc in seen:
            counts["run lines merged (same passage in several runs)"] += 1
            continue
        seen.add(doc)
        merged.add(doc, stored.ranks[place], stored.scores[place])
    return merged


def add_relevant(
    lists: Sequence[StoredList], numbers: dict[str, int], judged: dict[str, dict[str, int]], counts: Counter
) -> None:
    """Add the relevant passages that no run retrieved behind each list, with rank 0."""
    for stored in lists:
        present = set(stored.docs)
        for doc_id, relevance in judged.get(stored.query_id, {}).items():
            if relevance > 0 and numbers.get(doc_id) not in present:
                counts["relevant passages added (not retrieved)"] += 1
                stored.add(numbers.setdefault(doc_id, len(numbers)), NOT_RETRIEVED, 0.0)


def make_samples(
    lists: Sequence[StoredList],
    queries: dict[str, str],
    rows: array,
    doc_ids: Sequence[str],
    judged: dict[str, dict[str, int]] | None,
    labels: str,
    counts: Counter,
) -> Iterator[dict]:
    """Yield a sample for each list that has a query text, judgements where needed, and a passage with a text.

    `rows` is each document's row in the corpus by its number, -1 where it has no text.
    """
    for stored in lists:
        if stored.query_id not in queries:
            counts["lists left out: query unknown to the collection"] += 1
            continue
        if judged is not None and stored.query_id not in judged:
            counts["lists left out: query without judgements"] += 1
            continue
        places = [place for place, doc in enumerate(stored.docs) if rows[doc] >= 0]
        counts["passages left out: no text in the collection"] += len(stored.docs) - len(places)
        if not places:
            counts["lists left out: no passage has a text"] += 1
            continue
        ranks = [stored.ranks[place] for place in places]
        scores = [None if stored.ranks[place] == NOT_RETRIEVED else stored.scores[place] for place in places]
        if judged is not None:
            relevances = [judged[stored.query_id].get(doc_ids[stored.docs[place]]) for place in places]
            counts["passages taken as not relevant: unjudged"] += relevances.count(None)
            values = [float(relevance or 0) for relevance in relevances]
            counts["lists without a relevant passage (kept)"] += not any(value > 0 for value in values)
        elif labels == "rank":
            values = [float(len(places) - place) for place in range(len(places))]
        else:
            values = [stored.scores[place] for place in places]
        if IGNORE_LABEL in values:
            raise InputError(f"query {stored.query_id!r}: the label {IGNORE_LABEL} marks padding; shift the scores")
        counts["lists of a single passage (kept)"] += len(places) == 1
        counts["passages"] += len(places)
        yield {
            "query_id": stored.query_id,
            "query": queries[stored.query_id],
            "passages": [rows[stored.docs[place]] for place in places],
            "labels": values,
            "ranks": ranks,
            "scores": scores,
        }


def corpus_rows(collection: Collection, numbers: dict[str, int], rows: array) -> Iterator[dict]:
    """Yield the corpus and note in `rows` where each document went."""
    picked = collection.pick(numbers.keys())
    for row, doc in enumerate(tqdm(picked, desc="corpus", unit=" passages", total=len(numbers), disable=None)):
        rows[numbers[doc.doc_id]] = row
        yield {"doc_id": doc.doc_id, "text": doc.text}


def build(args: argparse.Namespace) -> tuple[Counter, Path]:
    """Build the folder; return what was counted."""
    collection = open_collection(args.collection)
    counts: Counter = Counter()
    judged: dict[str, dict[str, int]] | None = None
    qrels: list[Qrel] = []
    if args.labels == "relevance":
        qrels = list(read_qrels(args.qrels)) if args.qrels else collection.qrels()
        judged = {}
        for qrel in qrels:  # of a document judged for several subtopics, the highest relevance
            grades = judged.setdefault(qrel.query_id, {})
            grades[qrel.doc_id] = max(qrel.relevance, grades.get(qrel.doc_id, qrel.relevance))
    elif args.qrels:
        raise InputError(f"--qrels gives labels of relevance and is not used with --labels {args.labels}; leave it out")
    inputs = {"runs": {path: sha256(path) for path in args.run}, "collection": {args.collection: collection.sources()}}
    if args.qrels:
        inputs["qrels"] = {args.qrels: sha256(args.qrels)}
    with atomic_folder(args.output, overwrite=args.overwrite) as folder:
        lists, numbers = read_runs(args.run, args.depth, args.labels == "relevance", counts)
        if judged is not None and args.add_relevant:
            add_relevant(lists, numbers, judged, counts)
        settings = {"labels": args.labels, "depth": args.depth, "add_relevant": args.add_relevant}
        fingerprint = hashlib.sha256(json.dumps([inputs, settings], sort_keys=True).encode()).hexdigest()
        rows = array("i", [-1]) * len(numbers)
        corpus = corpus_rows(collection, numbers, rows)
        counts["corpus passages"] = write_arrow(folder / "corpus", corpus_features(), corpus, fingerprint)
        queries = collection.queries()
        samples = make_samples(lists, queries, rows, list(numbers), judged, args.labels, counts)
        counts["lists"] = write_arrow(folder / "samples", sample_features(), samples, fingerprint)
        if not counts["lists"]:
            reasons = ", ".join(f"{name}: {count}" for name, count in counts.items() if count and "left out" in name)
            raise InputError(f"no list is left ({reasons}); do the runs and {args.collection} belong together?")
        if judged is not None:
            kept = {stored.query_id for stored in lists} & judged.keys() & queries.keys()
            lines = (f"{q.query_id} {q.iteration} {q.doc_id} {q.relevance}\n" for q in qrels if q.query_id in kept)
            (folder / "qrels.txt").write_text("".join(lines), "utf-8")
        counts = Counter({name: count for name, count in counts.items() if count})
        meta = {"format": FORMAT_VERSION, **settings, "sources": inputs, "counts": dict(sorted(counts.items()))}
        meta["made_by"] = f"setenc_hf {__version__}"
        (folder / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n", "utf-8")
    return counts, Path(args.output)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_prep.build_samples", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--run", action="append", nargs="+", required=True, help="TREC run, plain or .gz; several make one set")
    add("--collection", required=True, help="an ir_datasets id or a folder: texts, queries and judgements")
    add("--labels", choices=LABEL_KINDS, required=True, help="judgements, or the run's order or scores as a teacher's")
    add("--qrels", help="judgements to use instead of the collection's own (TREC, or BEIR's .tsv)")
    add("--depth", type=int, default=100, help="passages kept of each list, from the top (default: %(default)s)")
    add(
        "--add-relevant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with relevance: add relevant passages that no run retrieved, for training only (default: yes)",
    )
    add("--tokenizer", help="folder or hub id: tokenise now what training would tokenise at its start")
    add("--output", required=True, help="folder to write")
    add("--overwrite", action="store_true", help="replace the folder if it is there")
    args = parser.parse_args(argv)
    args.run = [path for paths in args.run for path in paths]
    if args.depth < 1:
        raise InputError(f"--depth keeps at least 1 passage, got {args.depth}")
    repeated = [path for path, times in Counter(args.run).items() if times > 1]
    if repeated:
        raise InputError(f"--run names {repeated[0]} twice")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    counts, folder = build(args)
    if args.tokenizer:
        from setenc_hf.tokenization import SetEncoderTokenizer
        from setenc_hf.tokens import SampleTokens

        SampleTokens.of(ListwiseSamples.open(folder), SetEncoderTokenizer.from_pretrained(args.tokenizer).backend)
    for name, count in sorted(counts.items()):
        print(f"{count:>12,}  {name}")
    print(f"Wrote {counts['lists']:,} lists of {counts['corpus passages']:,} passages to {folder}")


if __name__ == "__main__":
    run_command(main)

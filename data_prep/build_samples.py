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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from setenc_hf import __version__
from setenc_hf.collection import Collection, Doc, open_collection
from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_folder, check_folder, sha256
from setenc_hf.hub import find_model
from setenc_hf.samples import (
    FORMAT_VERSION,
    LABEL_KINDS,
    ListwiseSamples,
    batched,
    corpus_features,
    open_arrow,
    sample_features,
    write_arrow,
)
from setenc_hf.trec import Qrel, read_qrels

from .corpora import FULL, Corpora, name_of
from .export_samples import add_arguments, publish
from .list_batches import Judgements, RankedLists, SampleMaker
from .run_spill import RunSpill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCS_PER_BATCH = 1_000


class Rows:
    """The row in the corpus of each document that lists need, filled in as the corpus goes by.

    Args:
        numbers: of the documents that are needed.
        total: how many numbers there are.
    """

    def __init__(self, numbers: Mapping[str, int], total: int) -> None:
        self.numbers = numbers
        self.of = np.full(total, -1, np.int32)  # by number of the document, -1 where it has no text
        self.seen = 0

    def note(self, doc_ids: Sequence[str]) -> None:
        """Note that these are the next rows of the corpus."""
        places = np.array([self.numbers.get(doc_id, -1) for doc_id in doc_ids], np.int32)
        needed = np.flatnonzero(places >= 0)
        self.of[places[needed]] = needed + self.seen
        self.seen += len(doc_ids)


def corpus_batches(docs: Iterable[Doc], rows: Rows) -> Iterator[pa.RecordBatch]:
    """Yield the corpus, and note where each document went."""
    schema = corpus_features().arrow_schema
    for batch in batched(tqdm(docs, desc="corpus", unit=" passages", unit_scale=True, disable=None), DOCS_PER_BATCH):
        doc_ids = [doc.doc_id for doc in batch]
        rows.note(doc_ids)
        yield pa.record_batch([doc_ids, [doc.text for doc in batch]], schema=schema)


def write_full_corpus(folder: Path, collection: Collection, corpora: Corpora, rows: Rows) -> None:
    """Write the whole collection, or link it where an earlier build kept it; the bytes are the same."""
    if corpora.link_full(folder):
        for chunk in open_arrow(folder).column("doc_id").chunks:
            rows.note(chunk.to_pylist())
        return
    fingerprint = fingerprint_of(collection.corpus_sources())
    write_arrow(folder, corpus_features(), corpus_batches(collection.docs(), rows), fingerprint)
    doc_ids = open_arrow(folder).column("doc_id")
    if pc.count_distinct(doc_ids).as_py() < len(doc_ids):
        for _ in collection.pick(doc_ids.to_pylist()):  # names the document and its line
            pass


def build(args: argparse.Namespace, collection: Collection) -> tuple[Counter, Path]:
    """Build the folder; return what was counted."""
    qrels: list[Qrel] | None = None
    if args.labels == "relevance":
        qrels = list(read_qrels(args.qrels)) if args.qrels else collection.qrels()
    elif args.qrels:
        raise InputError(f"--qrels gives labels of relevance and is not used with --labels {args.labels}; leave it out")
    inputs = {"runs": {path: sha256(path) for path in args.run}, "collection": {args.collection: collection.sources()}}
    if args.qrels:
        inputs["qrels"] = {args.qrels: sha256(args.qrels)}
    settings = {name: getattr(args, name) for name in ("labels", "depth", "add_relevant", "corpus")}
    counts: Counter = Counter()
    with atomic_folder(args.output, overwrite=args.overwrite) as folder:
        write_folder(folder, args, collection, qrels, fingerprint_of(inputs, settings), counts)
        counts = Counter({name: count for name, count in counts.items() if count})
        meta = {"format": FORMAT_VERSION, **settings, "sources": inputs, "counts": dict(sorted(counts.items()))}
        meta["made_by"] = f"setenc_hf {__version__}"
        (folder / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n", "utf-8")
    return counts, Path(args.output)


def fingerprint_of(*parts: object) -> str:
    """Return a hash of what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_folder(
    folder: Path,
    args: argparse.Namespace,
    collection: Collection,
    qrels: Sequence[Qrel] | None,
    fingerprint: str,
    counts: Counter,
) -> None:
    """Write samples, corpus and judgements; the lines of the runs wait in the folder meanwhile."""
    spill = RunSpill(folder / "lines", merge=qrels is not None)
    spill.read(args.run)
    judgements = Judgements(qrels, spill.query_ids, spill.docs, args.add_relevant) if qrels is not None else None
    ranked = RankedLists(spill, folder / "ranked", args.depth, judgements, counts)
    numbers = {doc_id: number for doc_id, number in spill.docs.items() if ranked.is_needed[number]}
    rows = Rows(numbers, len(spill.docs))
    spill.docs.clear()
    if args.corpus == "full":
        write_full_corpus(folder / "corpus", collection, Corpora(args.corpus_dir, collection), rows)
    else:
        corpus = corpus_batches(collection.pick(numbers.keys()), rows)
        write_arrow(folder / "corpus", corpus_features(), corpus, fingerprint)
    counts["corpus passages"] = rows.seen
    numbers.clear()
    queries = collection.queries()
    features = sample_features()
    maker = SampleMaker(spill.query_ids, queries, rows.of, judgements, args.labels, features.arrow_schema, counts)
    counts["lists"] = write_arrow(folder / "samples", features, map(maker.batch, ranked), fingerprint)
    ranked.path.unlink()
    if not counts["lists"]:
        reasons = ", ".join(f"{name}: {count}" for name, count in counts.items() if count and "left out" in name)
        raise InputError(f"no list is left ({reasons}); do the runs and {args.collection} belong together?")
    if qrels is not None:
        kept = queries.keys() & set(spill.query_ids)
        lines = (f"{q.query_id} {q.iteration} {q.doc_id} {q.relevance}\n" for q in qrels if q.query_id in kept)
        (folder / "qrels.txt").write_text("".join(lines), "utf-8")


def open_backend(name_or_path: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a model; raises `InputError` where there is none."""
    from setenc_hf.tokenization import SetEncoderTokenizer

    found = find_model(name_or_path)
    try:
        return SetEncoderTokenizer.from_pretrained(found).backend
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {name_or_path}: {' '.join(str(error).split())[:300]}") from None


def finish_corpus(
    args: argparse.Namespace, collection: Collection, folder: Path, backend: "PreTrainedTokenizerBase | None"
) -> None:
    """Tokenise what no earlier build has tokenised, and keep what others may use."""
    corpora = Corpora(args.corpus_dir, collection)
    name = FULL if args.corpus == "full" else None
    tokenizer = None
    if backend is not None:
        from setenc_hf.tokens import SampleTokens, fingerprint

        samples, tokenizer = ListwiseSamples.open(folder), fingerprint(backend)
        doc_ids = samples.corpus.data.table["doc_id"]
        known = list(corpora.known_tokens(doc_ids, tokenizer))
        reused = sum(int((part.rows >= 0).sum()) for part in known)
        SampleTokens.of(samples, backend, args.num_proc, known)
        print(f"{reused:>12,}  passages whose tokens were there, {len(doc_ids) - reused:,} tokenised")
        if reused < len(doc_ids) and name is None:
            name = name_of(doc_ids)
    if name is not None:
        corpora.keep(folder, name, tokenizer)
        print(f"Kept the corpus for later builds in {args.corpus_dir}")


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
    add("--num-proc", type=int, default=1, help="processes that tokenise (default: %(default)s)")
    add(
        "--corpus",
        choices=("referenced", "full"),
        default="referenced",
        help="keep the passages that a list needs, or the whole collection (default: %(default)s)",
    )
    add(
        "--corpus-dir",
        type=Path,
        help="where whole collections and tokens are kept for other builds (default: corpora, beside the output)",
    )
    add("--output", required=True, help="folder to write")
    add("--overwrite", action="store_true", help="replace the folder if it is there")
    add("--export", type=Path, help="also write the lists with their texts here, in Parquet, for `datasets` alone")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.push_to_hub and not args.export:
        args.export = Path(f"{args.output.rstrip('/')}-export")
    args.run = [path for paths in args.run for path in paths]
    args.corpus_dir = args.corpus_dir or Path(args.output).absolute().parent / "corpora"
    if args.num_proc < 1:
        raise InputError(f"--num-proc is at least 1 process, got {args.num_proc}")
    if args.depth < 1:
        raise InputError(f"--depth keeps at least 1 passage, got {args.depth}")
    repeated = [path for path, times in Counter(args.run).items() if times > 1]
    if repeated:
        raise InputError(f"--run names {repeated[0]} twice")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    collection = open_collection(args.collection)
    # what would fail at the end fails before hours of reading
    backend = open_backend(args.tokenizer) if args.tokenizer else None
    if args.export:
        check_folder(args.export, args.overwrite)
    collection.check_queries()
    counts, folder = build(args, collection)
    finish_corpus(args, collection, folder, backend)
    for name, count in sorted(counts.items()):
        print(f"{count:>12,}  {name}")
    print(f"Wrote {counts['lists']:,} lists of {counts['corpus passages']:,} passages to {folder}")
    if args.export:
        publish(folder, args.export, args.push_to_hub, args.private, args.overwrite)


if __name__ == "__main__":
    run_command(main)

"""First-stage retrieval: index a collection and search it for its queries.

    python -m data_prep.retrieve --collection C --retriever bm25 --index-dir D --depth 1000 --output bm25.run
    python -m data_prep.retrieve --collection C --retriever colbert --index-dir D2 --depth 200 --output colbert.run
    accelerate launch -m data_prep.retrieve --retriever colbert ...  # encodes on all GPUs of the machine

An interrupted command, killed at any moment, goes on where it stopped when it is given again, to the same bytes.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setenc_hf.collection import Collection, open_collection
from setenc_hf.command import run_command
from setenc_hf.errors import InputError

from .estimates import check_disk, estimate_bm25, estimate_colbert, parse_size
from .run_blocks import Query, RunCounts, search_in_blocks, select_queries

EXACT_UP_TO = 50_000
PROBES, CANDIDATES = 16, 4000


def parser() -> argparse.ArgumentParser:
    """Return the command line; nothing heavy is imported for it."""
    made = argparse.ArgumentParser(
        "data_prep.retrieve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = made.add_argument
    add("--collection", required=True, help="a folder with corpus and queries, or an ir_datasets id")
    add("--retriever", required=True, choices=["bm25", "colbert"], help="what scores the passages")
    add("--index-dir", required=True, type=Path, help="the index: built there unless it is there already")
    add("--depth", type=int, default=1000, help="passages kept per query (default 1000)")
    add("--output", required=True, type=Path, help="the run to write, TREC; `.gz` is compressed")
    add("--query-ids", type=Path, help="search only the queries this file names, one id a line")
    add("--num-proc", type=int, default=os.cpu_count() or 1, help="processes to index and threads to search with")
    bm25 = made.add_argument_group("bm25").add_argument
    bm25("--memory", default="4GB", help="what indexing may take, over all processes (default 4GB)")
    bm25("--analyzer", default="english", help="english (Lucene's), standard or whitespace")
    bm25("--k1", type=float, default=0.9, help="how slowly a term's count saturates (default 0.9)")
    bm25("--b", type=float, default=0.4, help="how much length counts, 0 to 1 (default 0.4)")
    colbert = made.add_argument_group("colbert").add_argument
    colbert("--model", default="colbert-ir/colbertv2.0", help="a folder or hub id (default colbert-ir/colbertv2.0)")
    colbert("--doc-length", type=int, help="tokens kept of a passage (default: the checkpoint's)")
    colbert("--batch-size", type=int, default=64, help="passages encoded together (default 64)")
    colbert("--engine", choices=["auto", "exact", "plaid", "fast-plaid"], default="auto",
            help="exact keeps every vector in 16 bits and scores every passage; plaid compresses; auto (default)\n"
                 f"is exact up to {EXACT_UP_TO:,} passages and plaid above; fast-plaid is the package of that name,\n"
                 "where the installed torch is the one its wheel was built for")  # fmt: skip
    colbert("--bits", type=int, choices=[1, 2, 4, 8], default=8,
            help="bits a dimension of a compressed vector (default 8); fewer take less disk and lose more")  # fmt: skip
    colbert("--probes", type=int, default=PROBES, help=f"centroids each query token looks up (default {PROBES})")
    colbert("--candidates", type=int, default=CANDIDATES,
            help=f"passages scored with restored vectors, at least 4 x depth (default {CANDIDATES:,})")  # fmt: skip
    colbert("--append", action="store_true", help="add the passages of another collection to the index")
    colbert("--check-recall", type=int, metavar="N", default=0,
            help="report how far the lists of the first N queries overlap with exact search;\n"
                 "encodes the collection once more")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Index, search, write the run and say what it holds."""
    args = parser().parse_args(argv)
    for name in ("depth", "num_proc", "batch_size", "probes", "candidates"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is at least 1, got {getattr(args, name)}")
    collection = open_collection(args.collection)
    queries = select_queries(collection, args.query_ids)
    if args.output.is_dir():
        raise InputError(f"{args.output}: is a directory; name a file to write")
    if args.index_dir.exists() and not args.index_dir.is_dir():
        raise InputError(f"{args.index_dir}: is a file; --index-dir names a folder")
    retrieve = retrieve_bm25 if args.retriever == "bm25" else retrieve_colbert
    counts = retrieve(collection, queries, args)
    if counts is None:  # one of several processes that encoded; the first of them searches and reports
        return
    print(
        f"{args.output}: {counts.lines:,} lines for {counts.queries - counts.without_hits:,} of {counts.queries:,} "
        f"queries ({counts.without_hits:,} without hits), depth {args.depth}"
    )


def retrieve_bm25(collection: Collection, queries: list[Query], args: argparse.Namespace) -> RunCounts | None:
    """Build the index where it is missing, and search it; None in all processes but the first."""
    from .analysis import open_analyzer
    from .bm25 import Bm25Searcher, check_parameters
    from .bm25_index import build_bm25
    from .index_files import INDEX_FILE, process_rank, read_json

    if process_rank()[0]:  # the first process indexes and searches with all cores
        return None
    passages = None
    memory = parse_size(args.memory)
    check_parameters(args.k1, args.b)
    open_analyzer(args.analyzer)  # or one line, before anything is written
    args.index_dir.mkdir(parents=True, exist_ok=True)
    if not (args.index_dir / INDEX_FILE).exists():
        passages = collection.count()
        if passages:
            estimate = estimate_bm25(collection, passages, args.analyzer, memory, args.num_proc)
            print(estimate, file=sys.stderr)
            check_disk(args.index_dir, estimate, [args.index_dir])
    with progress_bar("indexing", "passages", passages) as progress:
        build_bm25(collection, args.index_dir, args.analyzer, memory, args.num_proc, progress)
    searcher = Bm25Searcher(args.index_dir, args.k1, args.b)
    settings = read_json(args.index_dir / INDEX_FILE) | {"k1": args.k1, "b": args.b, "depth": args.depth}
    with ThreadPoolExecutor(args.num_proc) as threads, progress_bar("searching", "queries", len(queries)) as progress:

        def search(block: Sequence[Query]) -> Iterator[tuple[str, list[tuple[str, float]]]]:
            return threads.map(lambda query: (query[0], searcher.search(query[1], args.depth)), block)

        return search_in_blocks(args.output, queries, search, settings, "bm25", progress=progress)


def retrieve_colbert(collection: Collection, queries: list[Query], args: argparse.Namespace) -> RunCounts | None:
    """Encode and index what is missing, and search it; None in all processes but the first."""
    import torch
    from transformers.utils import logging

    from .colbert import ColbertSearcher, overlap, search_collection
    from .colbert_index import PLAN_FILE, build_colbert, unfinished_chunks
    from .fast_plaid import open_package
    from .index_files import INDEX_FILE, process_rank, read_json
    from .late_interaction import LateInteractionEncoder

    if args.engine == "fast-plaid":
        open_package()  # or one line, before hours of encoding
    number, processes = process_rank()
    torch.set_num_threads(max(args.num_proc // processes, 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    logging.set_verbosity_error()  # the projection is not part of the encoder, which transformers would report
    logging.disable_progress_bar()
    encoder = LateInteractionEncoder(args.model, device, args.doc_length)
    args.index_dir.mkdir(parents=True, exist_ok=True)
    passages, engine = None, args.engine
    begun = args.index_dir / PLAN_FILE
    if engine == "auto" and begun.exists():
        engine = read_json(begun).get("engine")
    if args.append or not (args.index_dir / INDEX_FILE).exists():
        passages = collection.count()
        if engine == "auto":
            engine = "exact" if passages is not None and passages <= EXACT_UP_TO else "plaid"
        if passages and number == 0:
            estimate = estimate_colbert(collection, passages, encoder, engine, args.bits)
            print(f"engine {engine}: {estimate}", file=sys.stderr)
            check_disk(args.index_dir, estimate, unfinished_chunks(args.index_dir))
    options = {"engine": engine, "bits": args.bits, "append": args.append, "batch_size": args.batch_size}
    with progress_bar("encoding", "passages", passages, number == 0) as progress:
        build_colbert(collection, args.index_dir, encoder, **options, progress=progress)
    if number:
        return None
    searcher = ColbertSearcher(args.index_dir, args.probes, args.candidates)
    settings = read_json(args.index_dir / INDEX_FILE) | {"probes": args.probes, "candidates": args.candidates}
    with progress_bar("searching", "queries", len(queries)) as progress:

        def search(block: Sequence[Query]) -> Iterator[tuple[str, list[tuple[str, float]]]]:
            vectors = encoder.encode_queries([text for _, text in block])
            return zip([query_id for query_id, _ in block], searcher.search(vectors, args.depth))

        settings |= {"depth": args.depth, "query_limit": encoder.settings.query_limit}
        counts = search_in_blocks(args.output, queries, search, settings, "colbert", progress=progress)
    if args.check_recall:
        vectors = encoder.encode_queries([text for _, text in queries[: args.check_recall]])
        exact = search_collection(collection, encoder, vectors, args.depth)
        parts = [overlap(*lists) for lists in zip(searcher.search(vectors, args.depth), exact)]
        print(f"overlap with exact search at {args.depth}: {sum(parts) / len(parts):.4f} over {len(parts)} queries")
    return counts


@contextmanager
def progress_bar(what: str, unit: str, total: int | None, shown: bool = True) -> Iterator[Any]:
    """Show rate and time left on standard error; gives the function to tell how many more are done."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=f" {unit}", total=total, unit_scale=True, disable=None if shown else True) as bar:
        yield bar.update


if __name__ == "__main__":
    run_command(main)

"""First-stage retrieval: index a collection and search it for its queries.

    python -m data_prep.retrieve --collection C --retriever bm25 --index-dir D --depth 1000 --output bm25.run

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

from .estimates import check_disk, count_passages, estimate_bm25, parse_size
from .run_blocks import RunCounts, search_in_blocks, select_queries


def parser() -> argparse.ArgumentParser:
    """Return the command line; nothing heavy is imported for it."""
    made = argparse.ArgumentParser(
        "data_prep.retrieve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = made.add_argument
    add("--collection", required=True, help="a folder with corpus and queries, or an ir_datasets id")
    add("--retriever", required=True, choices=["bm25"], help="what scores the passages")
    add("--index-dir", required=True, type=Path, help="the index: built there unless it is there already")
    add("--depth", type=int, default=1000, help="passages kept per query (default 1000)")
    add("--output", required=True, type=Path, help="the run to write, TREC; `.gz` is compressed")
    add("--query-ids", type=Path, help="search only the queries this file names, one id a line")
    add("--memory", default="4GB", help="what indexing may take, over all processes (default 4GB)")
    add("--num-proc", type=int, default=os.cpu_count() or 1, help="processes to index and threads to search with")
    bm25 = made.add_argument_group("bm25")
    bm25.add_argument("--analyzer", default="english", help="english (Lucene's), standard or whitespace")
    bm25.add_argument("--k1", type=float, default=0.9, help="how slowly a term's count saturates (default 0.9)")
    bm25.add_argument("--b", type=float, default=0.4, help="how much length counts, 0 to 1 (default 0.4)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Index, search, write the run and say what it holds."""
    args = parser().parse_args(argv)
    if args.depth < 1 or args.num_proc < 1:
        raise InputError(f"--depth and --num-proc are at least 1, got {args.depth} and {args.num_proc}")
    collection = open_collection(args.collection)
    queries = select_queries(collection, args.query_ids)
    if args.output.is_dir():
        raise InputError(f"{args.output}: is a directory; name a file to write")
    args.index_dir.mkdir(parents=True, exist_ok=True)
    counts = retrieve_bm25(collection, queries, args)
    print(
        f"{args.output}: {counts.lines:,} lines for {counts.queries - counts.without_hits:,} of {counts.queries:,} "
        f"queries ({counts.without_hits:,} without hits), depth {args.depth}"
    )


def retrieve_bm25(collection: Collection, queries: list[tuple[str, str]], args: argparse.Namespace) -> RunCounts:
    """Build the index where it is missing, and search it."""
    from .bm25 import Bm25Searcher
    from .bm25_index import build_bm25
    from .index_files import INDEX_FILE, read_json

    passages = None
    memory = parse_size(args.memory)
    if not (args.index_dir / INDEX_FILE).exists():
        passages = count_passages(collection)
        if passages:
            estimate = estimate_bm25(collection, passages, args.analyzer, memory, args.num_proc)
            print(estimate, file=sys.stderr)
            check_disk(args.index_dir, estimate)
    with progress_bar("indexing", "passages", passages) as progress:
        build_bm25(collection, args.index_dir, args.analyzer, memory, args.num_proc, progress)
    searcher = Bm25Searcher(args.index_dir, args.k1, args.b)
    settings = read_json(args.index_dir / INDEX_FILE) | {"k1": args.k1, "b": args.b, "depth": args.depth}
    with ThreadPoolExecutor(args.num_proc) as threads, progress_bar("searching", "queries", len(queries)) as progress:

        def search(block: Sequence[tuple[str, str]]) -> Iterator[tuple[str, list[tuple[str, float]]]]:
            return threads.map(lambda query: (query[0], searcher.search(query[1], args.depth)), block)

        return search_in_blocks(args.output, queries, search, settings, "bm25", progress=progress)


@contextmanager
def progress_bar(what: str, unit: str, total: int | None) -> Iterator[Any]:
    """Show rate and time left on standard error; gives the function to tell how many more are done."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=f" {unit}", total=total, unit_scale=True, disable=None) as bar:
        yield bar.update


if __name__ == "__main__":
    run_command(main)

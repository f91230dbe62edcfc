"""Search queries block by block, so that a killed search goes on where it stopped, and its run is whole or absent."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from setenc_hf.collection import Collection
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_file, read_lines
from setenc_hf.trec import write_run

from .index_files import INDEX_FILE, read_json, write_json

Query = tuple[str, str]  # (query_id, text)
Ranked = tuple[str, Sequence[tuple[str, float]]]  # (query_id, [(doc_id, score), ...]), best first


class RunCounts(NamedTuple):
    """What a search gave."""

    queries: int
    without_hits: int
    lines: int


def select_queries(collection: Collection, query_ids: Path | None) -> list[Query]:
    """Return the collection's queries, or those that the file `query_ids` names (first column of a line, each once).

    Raises `InputError` with `file:line` for an id that the collection lacks, and where there is no query at all.
    """
    queries = collection.queries()
    if query_ids is not None:
        wanted: dict[str, str] = {}
        for number, line in read_lines(query_ids):
            if not line.strip():
                continue
            query_id = line.split()[0]
            if query_id not in queries:
                raise InputError(f"{query_ids}:{number}: query {query_id!r} is not in {collection.name}")
            wanted[query_id] = queries[query_id]
        queries = wanted
    if not queries:
        raise InputError(f"{query_ids or collection.name}: holds no query")
    return list(queries.items())


def search_in_blocks(
    output: Path,
    queries: Sequence[Query],
    search: Callable[[Sequence[Query]], Iterable[Ranked]],
    settings: dict[str, Any],
    tag: str,
    block_size: int = 1000,
    progress: Callable[[int], object] = lambda done: None,
) -> RunCounts:
    """Write the run of all `queries` to `output`, in their order, by way of one file a block of queries.

    The blocks lie in a hidden folder beside `output` until it is complete. Blocks of other settings or queries, left
    by another command, are thrown away.

    Args:
        search: gives the ranked lists of a block.
        settings: all that the result depends on besides the queries.
        progress: told how many more queries are done.
    """
    blocks = output.with_name(f".{output.name}.blocks")
    digest = hashlib.sha256(json.dumps(queries).encode()).hexdigest()
    settings = settings | {"queries": digest, "block_size": block_size, "tag": tag}
    if not (blocks / INDEX_FILE).exists() or read_json(blocks / INDEX_FILE) != settings:
        shutil.rmtree(blocks, ignore_errors=True)
        write_json(blocks / INDEX_FILE, settings)
    paths = []
    for start in range(0, len(queries), block_size):
        block = queries[start : start + block_size]
        paths.append(blocks / f"{start:09d}.run")
        if not paths[-1].exists():
            write_run(paths[-1], search(block), tag)
        progress(len(block))
    lines, hit = 0, set()
    with atomic_file(output) as run:
        for line in _lines(paths):
            run.write(line)
            lines += 1
            hit.add(line.split(" ", 1)[0])
        if not lines:
            shutil.rmtree(blocks)
            raise InputError(f"no passage shares a term with any of the {len(queries)} queries; no run was written")
    shutil.rmtree(blocks)
    return RunCounts(len(queries), len(queries) - len(hit), lines)


def _lines(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8", newline="\n") as block:
            yield from block

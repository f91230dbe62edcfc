"""TREC runs and qrels: streaming readers that say `file:line`, and a writer that no tie-break can reorder.

Ids are text always: `0012`, `1e5`, `NaN` and `D-1/3` come out as they went in.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .errors import InputError
from .files import atomic_file, read_lines
from .run_columns import RunLine, parse_integer, parse_line, read_columns

__all__ = ["Qrel", "RankedList", "RunLine", "read_lists", "read_qrels", "read_run", "repeated_document", "write_run"]


class RankedList(NamedTuple):
    """The passages of one query, best first."""

    query_id: str
    lines: list[RunLine]


class Qrel(NamedTuple):
    """One judgement: `iteration` is the second column, the subtopic in diversity qrels."""

    query_id: str
    doc_id: str
    relevance: int
    iteration: str = "0"


def read_run(path: str | Path) -> Iterator[RunLine]:
    """Yield the lines of a TREC run (`query_id Q0 doc_id rank score tag`; blanks or tabs; plain or `.gz`) as they come.

    Raises `InputError` with `file:line` on another number of columns, a rank that is no integer, a score that is no
    finite number; and for a file without any line.
    """
    empty = True
    for number, text in read_lines(path):
        line = parse_line(path, number, text)
        if line is not None:
            empty = False
            yield line
    if empty:
        raise InputError(f"{path}: holds no run line; a run has lines `query_id Q0 doc_id rank score tag`")


def read_lists(path: str | Path, depth: int | None = None) -> Iterator[RankedList]:
    """Yield the run query by query, in order of first appearance, each list ordered by score, then by rank.

    Score decides, as in trec_eval; the rank column breaks ties, and after it the order in the file. `depth` cuts each
    list. Raises `InputError` where a query names a document twice.
    """
    table = pa.concat_tables(read_columns(path))
    queries = table.column("query_id").cast(pa.large_string()).combine_chunks().dictionary_encode()
    groups = np.asarray(queries.indices)  # numbered by first appearance
    scores, ranks = table.column("score").to_numpy(), table.column("rank").to_numpy()
    order = np.lexsort((ranks, -scores, groups))  # stable: after score and rank, the order in the file
    starts = np.searchsorted(groups[order], np.arange(len(queries.dictionary) + 1))
    columns = {name: table.column(name).cast(pa.large_string()).combine_chunks() for name in ("doc_id", "tag")}
    for number, query_id in enumerate(queries.dictionary.to_pylist()):
        places = order[starts[number] : starts[number + 1]]
        doc_ids = columns["doc_id"].take(pa.array(places)).to_pylist()
        if len(set(doc_ids)) < len(doc_ids):
            raise repeated_document(path, query_id, doc_ids)
        cut = places[:depth]
        tags = columns["tag"].take(pa.array(cut)).to_pylist()
        rows = zip(doc_ids, ranks[cut].tolist(), scores[cut].tolist(), tags)
        yield RankedList(query_id, [RunLine(query_id, *row) for row in rows])


def repeated_document(path: str | Path, query_id: str, doc_ids: Iterable[str]) -> InputError:
    """Return the error that names the line where a query's list holds a document for the second time."""
    seen: set[str] = set()
    repeated = {doc_id for doc_id in doc_ids if doc_id in seen or seen.add(doc_id)}  # type: ignore[func-returns-value]
    seen.clear()
    for number, text in read_lines(path):
        columns = text.split()
        if columns and columns[0] == query_id and columns[2] in repeated:
            if columns[2] in seen:
                return InputError(
                    f"{path}:{number}: document {columns[2]!r} stands twice in the list of query {query_id!r}; "
                    "a run ranks a document once"
                )
            seen.add(columns[2])
    raise AssertionError("a document was seen twice a moment ago; the file changed while it was read")


def write_run(path: str | Path, lists: Iterable[tuple[str, Sequence[tuple[str, float]]]], tag: str) -> int:
    """Write (query_id, [(doc_id, score), ...]) as a TREC run, whole or not at all; return the number of lines.

    Each list is written best first, ties in the order given, ranks from 1, and scores strictly decreasing in
    float32, so that no reader's rule for ties can change the order: a score that does not fall below the one before
    it is lowered to the next float32.
    """
    if len(tag.split()) != 1:
        raise InputError(f"a run's tag is one word without blanks, got {tag!r}")
    count = 0
    with atomic_file(path) as file:
        for query_id, scored in lists:
            ceiling = np.float32(np.inf)
            for rank, (doc_id, score) in enumerate(sorted(scored, key=lambda pair: -pair[1]), start=1):
                if not math.isfinite(score):
                    raise InputError(f"query {query_id!r}, document {doc_id!r}: the score {score} is not finite")
                ceiling = min(np.float32(score), np.nextafter(ceiling, np.float32(-np.inf)))
                file.write(f"{query_id} Q0 {doc_id} {rank} {ceiling!s} {tag}\n")
                count += 1
    return count


def read_qrels(path: str | Path) -> Iterator[Qrel]:
    """Yield judgements: TREC's four columns (`query_id iteration doc_id relevance`) or BEIR's three under a header.

    Raises `InputError` with `file:line` on another number of columns or a relevance that is no integer, and for a
    file without any judgement.
    """
    empty, beir = True, False
    for number, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        if empty and not beir and columns[0].lower() in ("query-id", "query_id") and len(columns) == 3:
            beir = True
            continue
        empty = False
        if len(columns) != (3 if beir else 4):
            form = "3 columns (query-id corpus-id score)" if beir else "4 columns (query_id 0 doc_id relevance)"
            raise InputError(f"{path}:{number}: a qrels line has {form}, {len(columns)}: {line.strip()[:200]!r}")
        query_id, iteration, doc_id, relevance = (columns[0], "0", *columns[1:]) if beir else columns
        yield Qrel(query_id, doc_id, parse_integer(relevance, "relevance", path, number), iteration)
    if empty:
        raise InputError(f"{path}: holds no judgement; qrels have lines `query_id 0 doc_id relevance`")

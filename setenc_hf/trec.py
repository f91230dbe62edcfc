"""TREC runs and qrels: streaming readers that say `file:line`, and a writer that no tie-break can reorder.

Ids are text always: `0012`, `1e5`, `NaN` and `D-1/3` come out as they went in.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import InputError
from .files import atomic_file, read_lines


class RunLine(NamedTuple):
    """One line of a TREC run."""

    query_id: str
    doc_id: str
    rank: int
    score: float
    tag: str


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
    for number, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        empty = False
        if len(columns) != 6:
            raise InputError(
                f"{path}:{number}: a TREC run line has 6 columns (query_id Q0 doc_id rank score tag), "
                f"got {len(columns)}: {line.strip()[:200]!r}"
            )
        query_id, _, doc_id, rank, score, tag = columns
        yield RunLine(query_id, doc_id, _integer(rank, "rank", path, number), _finite(score, path, number), tag)
    if empty:
        raise InputError(f"{path}: holds no run line; a run has lines `query_id Q0 doc_id rank score tag`")


def read_lists(path: str | Path, depth: int | None = None) -> Iterator[RankedList]:
    """Yield the run query by query, in order of first appearance, each list ordered by score, then by rank.

    Score decides, as in trec_eval; the rank column breaks ties, and after it the order in the file. `depth` cuts each
    list. Raises `InputError` where a query names a document twice.
    """
    lists: dict[str, dict[str, RunLine]] = {}
    for line in read_run(path):
        docs = lists.setdefault(line.query_id, {})
        if line.doc_id in docs:
            raise InputError(
                f"{path}:{_line_of_second(path, line)}: document {line.doc_id!r} stands twice in the list of query "
                f"{line.query_id!r}; a run ranks a document once"
            )
        docs[line.doc_id] = line
    for query_id in list(lists):
        lines = sorted(lists.pop(query_id).values(), key=lambda line: (-line.score, line.rank))
        yield RankedList(query_id, lines[:depth])


def _line_of_second(path: str | Path, wanted: RunLine) -> int:
    """Return where a document stands for the second time in its query's list (the readers keep no line numbers)."""
    seen = 0
    for number, line in read_lines(path):
        columns = line.split()
        if columns and (columns[0], columns[2]) == (wanted.query_id, wanted.doc_id):
            seen += 1
            if seen == 2:
                return number
    raise AssertionError("the document was seen twice a moment ago; the file changed while it was read")


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
                    raise ValueError(f"query {query_id!r}, document {doc_id!r}: the score {score} is not finite")
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
        yield Qrel(query_id, doc_id, _integer(relevance, "relevance", path, number), iteration)
    if empty:
        raise InputError(f"{path}: holds no judgement; qrels have lines `query_id 0 doc_id relevance`")


def _integer(text: str, what: str, path: str | Path, number: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{path}:{number}: the {what} is not a whole number: {text!r}") from None


def _finite(text: str, path: str | Path, number: int) -> float:
    try:
        score = float(text)
    except ValueError:
        raise InputError(f"{path}:{number}: the score is not a number: {text!r}") from None
    if not math.isfinite(score):
        raise InputError(f"{path}:{number}: the score is not finite: {text!r}")
    return score

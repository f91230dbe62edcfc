"""TREC run lines, one by one or as columns: Arrow parses what is plain, Python what is not, to the same result.

A run is read in blocks of whole lines. Nearly every block has one separator and nothing odd in it, and Arrow's parser
takes it; any other block, and any that Arrow refuses, goes line by line, so that a line means the same either way and
an error names it.
"""

import io
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.types

from .errors import InputError
from .files import DAMAGED, decode_line, open_bytes, read_lines

BLOCK_BYTES = 1 << 24
PARSER_BYTES = 1 << 21  # what one thread of Arrow's parser takes at a time
LARGEST_INTEGER = 2**63 - 1
LARGEST_SCORE = float(np.finfo(np.float32).max)
NAMES = ("query_id", "iteration", "doc_id", "rank", "score", "tag")
SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("rank", pa.int64()),
        ("score", pa.float64()),
        ("tag", pa.string()),
    ]
)
# what `str.split` takes for a blank beside blank, tab and line feed
ODD_BLANKS = re.compile("[\x0b-\x0d\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


class RunLine(NamedTuple):
    """One line of a TREC run."""

    query_id: str
    doc_id: str
    rank: int
    score: float
    tag: str


def parse_line(path: str | Path, number: int, line: str) -> RunLine | None:
    """Return what a line says, None for a blank one; raises `InputError` with `file:line`."""
    columns = line.split()
    if not columns:
        return None
    if len(columns) != 6:
        raise InputError(
            f"{path}:{number}: a TREC run line has 6 columns (query_id Q0 doc_id rank score tag), "
            f"got {len(columns)}: {line.strip()[:200]!r}"
        )
    query_id, _, doc_id, rank, score, tag = columns
    return RunLine(query_id, doc_id, parse_integer(rank, "rank", path, number), parse_score(score, path, number), tag)


def parse_integer(text: str, what: str, path: str | Path, number: int) -> int:
    """Return a whole number of 64 bits; raises `InputError` with `file:line`."""
    try:
        value = int(text)
    except ValueError:
        raise InputError(f"{path}:{number}: the {what} is not a whole number: {text[:200]!r}") from None
    if abs(value) > LARGEST_INTEGER:
        raise InputError(f"{path}:{number}: the {what} is beyond 64 bits: {text[:200]!r}")
    return value


def parse_score(text: str, path: str | Path, number: int) -> float:
    """Return a score that float32 can hold; raises `InputError` with `file:line`."""
    try:
        score = float(text)
    except ValueError:
        raise InputError(f"{path}:{number}: the score is not a number: {text[:200]!r}") from None
    if not abs(score) <= LARGEST_SCORE:
        what = "beyond float32" if math.isfinite(score) else "not finite"
        raise InputError(f"{path}:{number}: the score is {what}: {text[:200]!r}")
    return score


def read_columns(path: str | Path, block_bytes: int = BLOCK_BYTES) -> Iterator[pa.Table]:
    """Yield a run as tables of `SCHEMA`, in the order of the file; one thread reads ahead by a block.

    Raises `InputError` as [`parse_line`] does, for a file without any line, and as `read_lines` for what is no text.
    """
    empty = True
    tables = (table for block in _read_blocks(path, block_bytes) if (table := _parse(path, *block)).num_rows)
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, tables, None)
        while (table := following.result()) is not None:
            following = reader.submit(next, tables, None)
            empty = False
            yield table
    if empty:
        raise InputError(f"{path}: holds no run line; a run has lines `query_id Q0 doc_id rank score tag`")


def _read_blocks(path: str | Path, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, whole lines)."""
    number, rest = 1, b""
    try:
        with open_bytes(path) as file:
            while data := file.read(block_bytes):
                end = data.rfind(b"\n") + 1
                if not end:
                    rest += data
                    continue
                block, rest = rest + data[:end], data[end:]
                yield number, block
                number += block.count(b"\n")
    except DAMAGED:  # the plain reader knows the line
        for _ in read_lines(path):
            pass
        raise
    if rest:
        yield number, rest


def _parse(path: str | Path, first: int, block: bytes) -> pa.Table:
    table = _parse_plain(block)
    return _parse_lines(path, first, block) if table is None else table


def _parse_plain(block: bytes) -> pa.Table | None:
    """Parse a block with Arrow; None where it may mean something else to Arrow than to `parse_line`."""
    block = block.replace(b"\r\n", b"\n") if b"\r" in block else block
    separator = b"\t" if b"\t" in block[: block.find(b"\n")] else b" "
    odd_number = separator + b"0x"
    if not _is_regular(np.frombuffer(block, np.uint8), ord(separator)) or odd_number in block.replace(b"0X", b"0x"):
        return None
    if not block.isascii():
        try:
            text = block.decode()
        except UnicodeDecodeError:
            return None
        if ODD_BLANKS.search(text) or text[0] == "\ufeff":
            return None
    types = {name: SCHEMA.field(name).type if name in SCHEMA.names else pa.string() for name in NAMES}
    try:
        table = pyarrow.csv.read_csv(
            pa.py_buffer(block),
            pyarrow.csv.ReadOptions(column_names=NAMES, block_size=PARSER_BYTES),
            pyarrow.csv.ParseOptions(delimiter=separator.decode(), quote_char=False, escape_char=False),
            pyarrow.csv.ConvertOptions(
                column_types=types, include_columns=SCHEMA.names, null_values=[], strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        return None
    scores = table.column("score")
    if not all((np.abs(chunk.to_numpy()) <= LARGEST_SCORE).all() for chunk in scores.chunks):
        return None
    return table


def _is_regular(block: np.ndarray, separator: int) -> bool:
    """Say whether a block is ASCII-blank-free but for single separators and line feeds, none beside another."""
    blanks = block <= 32
    if blanks[0] or (blanks[1:] & blanks[:-1]).any():
        return False
    kinds = np.bincount(block[blanks], minlength=33)
    return int(kinds[separator] + kinds[10]) == int(kinds.sum()) and (block[-1] != separator)


def _parse_lines(path: str | Path, first: int, block: bytes) -> pa.Table:
    rows = []
    for number, raw in enumerate(io.BytesIO(block), start=first):
        line = parse_line(path, number, decode_line(path, number, raw))
        if line is not None:
            rows.append(line)
    return _table(rows)


def _table(rows: Iterable[RunLine]) -> pa.Table:
    columns = list(zip(*rows)) or [()] * len(SCHEMA)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA)], schema=SCHEMA)

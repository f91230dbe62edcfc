"""Figures as text: spreads, tables in Markdown, and the place in a document where they stand."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from setenc_hf.errors import InputError
from setenc_hf.files import atomic_file


class Spread(NamedTuple):
    """The least, the middle and the most of several measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1])

    def show(self, form: str = "{:.2f}") -> str:
        """Return `median (least to most)`."""
        low, median, high = (form.format(value) for value in self)
        return f"{median} ({low} to {high})"


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of the ratios of measurements that belong together, one by one."""
    return Spread.of(over / under for over, under in zip(above, below, strict=True))


def processor() -> str:
    """Return the processor's name as the system gives it, with its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; every row has a cell for each column."""
    lines = [header, ["---"] * len(header), *rows]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"a row has {len(line)} cells for {len(header)} columns: {line}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def marks(name: str) -> tuple[str, str]:
    """Return the lines of a document between which the report of a benchmark, such as `speed.py`, is written."""
    return f"<!-- begin: {name} -->", f"<!-- end: {name} -->"


def write_report(path: Path, text: str, name: str) -> None:
    """Write a report: between the two marks of a document that has them, else as a file of its own."""
    whole = text + "\n"
    if path.exists():
        begin, end = marks(name)
        document = path.read_text("utf-8")
        if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
            raise InputError(f"{path}: exists, and has no lines {begin!r} and {end!r} to write between")
        head, rest = document.split(begin)
        whole = f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    with atomic_file(path) as file:
        file.write(whole)

"""The lines of runs, numbered and gathered by list on disk, so that memory holds some thousand lists at a time.

Ids become numbers as they are read; a line is 28 bytes in the file of its bucket of lists. What stays in memory is
the text of each query's and each document's id, once.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from setenc_hf.run_columns import read_columns
from setenc_hf.trec import repeated_document

LINE = np.dtype([("list", "<i4"), ("run", "<i4"), ("doc", "<i4"), ("rank", "<i8"), ("score", "<f8")])
LISTS_PER_BUCKET = 1_024


class Numbers(dict[str, int]):
    """The number of each text, in order of first appearance."""

    def of(self, texts: pa.ChunkedArray) -> np.ndarray:
        """Return the number of each text, int32 [texts]; a new text gets the next one."""
        encoded = texts.combine_chunks().dictionary_encode()
        unique = encoded.dictionary.to_pylist()
        numbers = list(map(self.get, unique))
        for place, number in enumerate(numbers):
            if number is None:
                numbers[place] = self[unique[place]] = len(self)
        return np.array(numbers, np.int32)[np.asarray(encoded.indices)]


class RunSpill:
    """Runs read into buckets of lists, in order of first appearance.

    Args:
        folder: where to keep the lines meanwhile; must not exist.
        merge: one list a query over all runs; else every run has lists of its own.
    """

    def __init__(self, folder: Path, merge: bool) -> None:
        self.folder = folder
        self.merge = merge
        self.docs = Numbers()
        self.query_ids: list[str] = []  # by number of the list
        self.paths: list[str] = []
        folder.mkdir()

    def read(self, paths: Sequence[str]) -> None:
        """Read runs; raises `InputError` with `file:line` as `read_columns` does."""
        numbers = Numbers()
        for path in paths:
            if not self.merge:
                self.query_ids += numbers
                numbers = Numbers()
            first = len(self.query_ids)
            with tqdm(desc=Path(path).name, unit=" lines", unit_scale=True, disable=None) as progress:
                for table in read_columns(path):
                    lines = np.empty(table.num_rows, LINE)
                    lines["list"] = numbers.of(table.column("query_id")) + first
                    lines["run"] = len(self.paths)
                    lines["doc"] = self.docs.of(table.column("doc_id"))
                    lines["rank"], lines["score"] = table.column("rank"), table.column("score")
                    self._append(lines)
                    progress.update(len(lines))
            self.paths.append(path)
        self.query_ids += numbers

    def _append(self, lines: np.ndarray) -> None:
        buckets = lines["list"] // LISTS_PER_BUCKET
        if (np.diff(buckets) < 0).any():
            order = np.argsort(buckets, kind="stable")
            lines, buckets = lines[order], buckets[order]
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(lines)]):
            with open(self.folder / str(buckets[start]), "ab") as file:
                file.write(lines[start:end].data)

    def buckets(self) -> Iterator[np.ndarray]:
        """Yield the lines of some lists at a time, by list, by run, best first; then remove them from the disk.

        Score decides, then the rank column, then the order in the file. Raises `InputError` where a run's list holds
        a document twice.
        """
        for bucket in range(-(-len(self.query_ids) // LISTS_PER_BUCKET)):
            lines = np.fromfile(self.folder / str(bucket), LINE)
            group = lines["list"].astype(np.int64) * len(self.paths) + lines["run"]
            if not _is_sorted(group, -lines["score"], lines["rank"]):
                order = np.lexsort((lines["rank"], -lines["score"], group))
                lines, group = lines[order], group[order]
            self._check_repeated(lines, group)
            (self.folder / str(bucket)).unlink()
            yield lines
        shutil.rmtree(self.folder)

    def _check_repeated(self, lines: np.ndarray, group: np.ndarray) -> None:
        pairs = (group - group[0]) * len(self.docs) + lines["doc"]
        pairs.sort()
        repeated = pairs[1:][pairs[1:] == pairs[:-1]]
        if len(repeated):
            first, doc = divmod(int(repeated[0]), len(self.docs))
            number, run = divmod(first + int(group[0]), len(self.paths))
            doc_ids = [doc_id for doc_id, place in self.docs.items() if place == doc]
            raise repeated_document(self.paths[run], self.query_ids[number], doc_ids * 2)


def _is_sorted(*keys: np.ndarray) -> bool:
    """Say whether rows are in ascending order of their keys, the first one deciding."""
    tied = np.ones(len(keys[0]) - 1, bool)
    for key in keys:
        if (tied & (key[1:] < key[:-1])).any():
            return False
        tied &= key[1:] == key[:-1]
    return True

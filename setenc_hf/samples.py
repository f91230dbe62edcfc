"""Listwise samples: the folder between run files and training.

    samples/    Arrow: query_id, query, passages (row numbers into the corpus), labels, ranks, scores
    corpus/     Arrow: doc_id, text; each passage once
    qrels.txt   the judgements of these queries, where the labels come from judgements
    tokens/     the corpus and the queries tokenised, one folder a tokenizer; made when first needed
    meta.json   where everything came from, with hashes, and what was left out and why

Both Arrow folders open with `datasets.load_from_disk` too.
"""

import bisect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .errors import InputError
from .trec import Qrel, read_qrels

if TYPE_CHECKING:
    from datasets import Dataset, Features

LABEL_KINDS = ("relevance", "rank", "score")
IGNORE_LABEL = -100.0  # in a batch, the label behind the end of a shorter list
FORMAT_VERSION = 1
SHA_256 = re.compile("[0-9a-f]{64}")


def sample_features() -> "Features":
    """One list: `passages`, `labels`, `ranks` and `scores` align; a passage that no run retrieved has rank 0."""
    from datasets import Features, List, Value

    return Features(
        {
            "query_id": Value("string"),
            "query": Value("string"),
            "passages": List(Value("int32")),  # row numbers into the corpus
            "labels": List(Value("float32")),  # higher is better
            "ranks": List(Value("int32")),  # in the run, from 1; 0: added from the judgements
            "scores": List(Value("float32")),  # in the run; null: added from the judgements
        }
    )


def corpus_features() -> "Features":
    """One passage."""
    from datasets import Features, Value

    return Features({"doc_id": Value("string"), "text": Value("string")})


def source_lines(sources: Mapping[str, Any]) -> list[str]:
    """Return a line for a card for each file that samples were made from: its name and its SHA-256."""
    return [
        f"- from `{name}`" + (f", SHA-256 `{mark}`" if SHA_256.fullmatch(mark) else f" ({mark})")
        for name, mark in source_hashes(sources)
    ]


def source_hashes(sources: Mapping[str, Any], collection: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, SHA-256) of the files that samples were made from, of a path its last parts only.

    A collection of `ir_datasets` goes by its id, with the package's version in place of a hash.
    """
    for name, value in sources.items():
        if isinstance(value, Mapping) and value.keys() == {name}:
            yield name, str(value[name])
        elif isinstance(value, Mapping):
            yield from source_hashes(value, Path(name).name if name not in ("runs", "qrels", "collection") else "")
        else:
            yield "/".join(filter(None, [collection, Path(name).name])), str(value)


def write_arrow(folder: Path, features: "Features", batches: Iterable[pa.RecordBatch], fingerprint: str) -> int:
    """Write batches of rows as a folder that `datasets.load_from_disk` opens, in bounded memory; return how many rows.

    Equal batches and an equal fingerprint give equal bytes.
    """
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    count = 0
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            count += batch.num_rows
    write_description(folder, features, [name], fingerprint)
    return count


def write_description(folder: Path, features: "Features", files: Sequence[str], fingerprint: str) -> None:
    """Write what makes `datasets.load_from_disk` open a folder of Arrow files."""
    from datasets import DatasetInfo

    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), "utf-8")
    DatasetInfo(features=features).write_to_directory(str(folder))


def open_arrow(folder: Path) -> pa.Table:
    """Open what `write_arrow` wrote, memory-mapped."""
    state = json.loads((folder / "state.json").read_text("utf-8"))
    tables = (
        pa.ipc.open_stream(pa.memory_map(str(folder / file["filename"]))).read_all() for file in state["_data_files"]
    )
    return pa.concat_tables(tables)


class SampleRows:
    """The lists of a folder by row, as arrays that stay on disk: a tenth of the cost of a row of a `Dataset`.

    Args:
        folder: with the Arrow files of the lists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = open_arrow(folder).to_batches()
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)]).tolist()
        self.columns = {
            name: [_values(batch.column(name)) for batch in self.batches] for name in ("passages", "labels", "ranks")
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleRows, (self.folder,)  # a process that is started anew maps the files itself

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return `query_id`, and `passages`, `labels` and `ranks` as arrays [passages], not to be written to."""
        number = bisect.bisect_right(self.starts, row) - 1
        place = row - self.starts[number]
        sample: dict[str, Any] = {"query_id": self.batches[number].column("query_id")[place].as_py()}
        for name, chunks in self.columns.items():
            offsets, values = chunks[number]
            sample[name] = values[offsets[place] : offsets[place + 1]]
        return sample


def is_within(ranks: np.ndarray, depth: int | None) -> np.ndarray:
    """Return which ranks lie in the top `depth`; rank 0, a passage added from the judgements, does."""
    return np.ones(len(ranks), bool) if depth is None else ranks <= depth


def _values(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(lists.offsets), np.asarray(lists.values)


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield `rows` in lists of `size`, the last one shorter."""
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass
class ListwiseSamples:
    """An opened folder of listwise samples; nothing of it is read into memory before it is used."""

    folder: Path
    samples: "Dataset"
    corpus: "Dataset"
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "ListwiseSamples":
        """Open a folder that `data_prep.build_samples` made; raises `InputError` where it is none."""
        from datasets import load_from_disk

        folder = Path(folder)
        meta_path = folder / "meta.json"
        if not meta_path.exists():
            raise InputError(
                f"{folder}: no listwise samples here (no meta.json); make them with data_prep.build_samples"
            )
        meta = json.loads(meta_path.read_text("utf-8"))
        if meta.get("format") != FORMAT_VERSION:
            raise InputError(f"{folder}: format {meta.get('format')} is not {FORMAT_VERSION}; build the samples again")
        samples, corpus = (load_from_disk(str(folder / name)) for name in ("samples", "corpus"))
        return cls(folder, samples, corpus, meta)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels_kind(self) -> str:
        """`relevance`, `rank` or `score`."""
        return self.meta["labels"]

    def qrels(self) -> list[Qrel]:
        """Return the judgements of these queries; raises `InputError` where the labels are not judgements."""
        path = self.folder / "qrels.txt"
        if not path.exists():
            raise InputError(f"{self.folder}: has no judgements to evaluate with; build it with --labels relevance")
        return list(read_qrels(path))

    @cached_property
    def rows(self) -> SampleRows:
        """The lists by row, for reading many of them fast."""
        return SampleRows(self.folder / "samples")

    def list_lengths(self, depth: int | None = None) -> np.ndarray:
        """Return the passages of each list [lists], of its top `depth` (those added from the judgements are within)."""
        return self._counts(lambda labels, ranks: is_within(ranks, depth))

    def relevant_counts(self, depth: int | None = None) -> np.ndarray:
        """Return how many passages of each list, or of its top `depth`, have a label above 0 [lists]."""
        return self._counts(lambda labels, ranks: (labels > 0) & is_within(ranks, depth))

    def _counts(self, counted: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Return how many passages of each list are counted, as told from their labels and ranks."""
        counts = []
        for labels, ranks in zip(self._column("labels").chunks, self._column("ranks").chunks, strict=True):
            sums = np.concatenate([[0], np.cumsum(counted(np.asarray(labels.flatten()), np.asarray(ranks.flatten())))])
            ends = np.cumsum(labels.value_lengths())
            counts.append(np.diff(sums[ends], prepend=0))
        return np.concatenate(counts)

    def best_ranks(self) -> np.ndarray:
        """Return the best rank of a retrieved passage of each list [lists]; 0 where none was retrieved."""
        best = []
        for chunk in self._column("ranks").chunks:
            offsets = np.asarray(chunk.offsets)
            ranks = np.asarray(chunk.values)[: offsets[-1]]
            unseen = np.iinfo(ranks.dtype).max
            ranks = np.append(np.where(ranks > 0, ranks, unseen), unseen)  # so that an empty last list has a place
            lowest = np.minimum.reduceat(ranks, offsets[:-1]) if len(chunk) else ranks[:0]
            best.append(np.where((lowest == unseen) | (offsets[1:] == offsets[:-1]), 0, lowest))
        return np.concatenate(best)

    def query_ids(self) -> list[str]:
        """Return the query of each list [lists]."""
        return self._column("query_id").to_pylist()

    def doc_ids(self, rows: Sequence[int]) -> list[str]:
        """Return the documents' ids of corpus rows."""
        return self.corpus[list(rows)]["doc_id"]

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.samples.data.table.column(name)

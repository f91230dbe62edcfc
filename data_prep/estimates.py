"""What an index will need, told before it is built, from the number of passages and a sample of them."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from setenc_hf.collection import Collection, Doc
from setenc_hf.errors import InputError

if TYPE_CHECKING:
    from .late_interaction import LateInteractionEncoder

SAMPLE = 1000


class Estimate(NamedTuple):
    """Bytes that an index takes, and that its making takes at its widest."""

    passages: int
    disk: int
    peak_disk: int
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.passages:,} passages: about {size(self.disk)} of index, {size(self.peak_disk)} of disk and "
            f"{size(self.memory)} of memory while it is built"
        )


def sample_passages(collection: Collection) -> list[Doc]:
    """Return the first passages of a collection."""
    return list(itertools.islice(collection.docs(), SAMPLE))


def estimate_bm25(collection: Collection, passages: int, analyzer: str, memory: int, num_proc: int) -> Estimate:
    """Estimate a BM25 index from the distinct terms of a sample: 4 bytes a row, 1 a count, and the ids."""
    from .analysis import open_analyzer
    from .bm25_index import RANGE_DOCS, WORKER_MEMORY, memory_of_range

    analyze = open_analyzer(analyzer).terms
    sample = sample_passages(collection)
    postings = fmean(len(set(analyze(doc.text))) for doc in sample)
    ids = fmean(len(doc.doc_id.encode()) + 8 for doc in sample)
    characters = fmean(len(doc.text) for doc in sample)
    index = round(passages * (5 * postings + ids + 1))
    in_flight = min(passages, RANGE_DOCS * (num_proc + 1))
    needed = num_proc * WORKER_MEMORY + memory_of_range(in_flight * characters)
    return Estimate(passages, index, round(2.2 * index), min(memory, round(needed)))


def estimate_colbert(
    collection: Collection, passages: int, encoder: LateInteractionEncoder, engine: str, bits: int
) -> Estimate:
    """Estimate an index of token vectors: 16 bits a dimension, or `bits` with centroid, list and scale, or both."""
    from .colbert_index import CHUNK_PASSAGES
    from .residual_codec import PRODUCTS_AT_ONCE, SAMPLES_PER_CENTROID, centroids_for

    sample = sample_passages(collection)
    vectors = fmean(encoder.count_vectors([doc.text for doc in sample]))
    ids = fmean(2 * len(doc.doc_id.encode()) + 16 for doc in sample)
    bytes_a_vector = 0 if engine == "plaid" else 2 * encoder.dim
    memory = 4 * encoder.dim * vectors * min(passages, CHUNK_PASSAGES) * 3 + 1_000_000_000
    if engine != "exact":
        bytes_a_vector += encoder.dim * bits // 8 + 10  # a centroid, its list entry and a scale
        memory += 8 * encoder.dim * SAMPLES_PER_CENTROID * centroids_for(passages * vectors) + 4 * PRODUCTS_AT_ONCE
    index = round(passages * (vectors * bytes_a_vector + ids + 4))
    return Estimate(passages, index, index, round(memory))


def check_disk(folder: Path, estimate: Estimate, begun: Iterable[Path]) -> None:
    """Raise `InputError` where the disk of `folder` cannot hold what is to be made.

    Args:
        begun: folders of what an interrupted build has made of it already.
    """
    needed = estimate.peak_disk - sum(map(bytes_in, begun))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {size(free)} are free and about {size(needed)} are needed")


def bytes_in(folder: Path) -> int:
    """Return the bytes of all files in a folder; what another process takes away meanwhile is passed over."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def size(count: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parse_size(text: str) -> int:
    """Return the bytes of `4GB`, `500MB` or a plain number; raises `InputError` on anything else."""
    number, factor = text.strip().upper().removesuffix("B"), 1
    if number and number[-1] in "KMGT":
        number, factor = number[:-1], 1000 ** ("KMGT".index(number[-1]) + 1)
    try:
        count = round(float(number) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        raise InputError(f"a size is a number with KB, MB or GB, such as 4GB, got {text!r}")
    return count

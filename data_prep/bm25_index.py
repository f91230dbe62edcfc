"""Build a BM25 index by ranges of passages, in bounded memory, over several processes, resumable after any kill.

Each range becomes a folder under `parts/` that is there whole or not at all; the last step merges the parts into one
inverted index. The bytes of the result depend on the passages and the analyzer alone: not on the memory, the number
of processes or the interruptions.

The index (all arrays little-endian and memory-mapped):
`index.json`     format, version, analyzer, source of the passages, counts
`doc_ids.arrow`  id by row, the collection's order
`terms.arrow`    the vocabulary, in order of its UTF-8 bytes
`offsets.npy`    int64 [terms + 1]: where a term's postings begin
`docs.npy`       int32 [postings]: rows, ascending within a term
`freqs.npy`      uint8, uint16 or int32 [postings]: how often the term stands in the passage
`lengths.npy`    uint8 [passages]: the passage's length in Lucene's one-byte code
"""

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array

from setenc_hf.collection import Collection, Doc
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_folder

from .analysis import Analyzer, open_analyzer
from .index_files import (
    INDEX_FILE,
    check_settings,
    check_unique,
    corpus_source,
    map_array,
    one_builder,
    read_texts,
    worker_pool,
    write_json,
    write_texts,
)

FORMAT, VERSION = "bm25", 1
RANGE_DOCS = 50_000
MEMORY_PER_CHARACTER = 12  # measured: a worker's peak beyond its start, over the characters of its range, is below 10
WORKER_MEMORY = 300_000_000  # a worker before its first passage, with its cache of stems


def _decode_length(code: int) -> int:
    """Return the length that Lucene's `SmallFloat.byte4ToInt` gives for a byte: exact to 39, then to 4 bits."""
    if code < 24:
        return code
    shift = ((code - 24) >> 3) - 1
    mantissa = (code - 24) & 7
    return 24 + (mantissa if shift < 0 else (mantissa | 8) << shift)


LENGTHS = np.array([_decode_length(code) for code in range(256)], dtype=np.int64)  # [256], ascending


def memory_of_range(characters: float) -> int:
    """Return the bytes that a range of so many characters takes while it is read and indexed."""
    return round(MEMORY_PER_CHARACTER * characters)


class Range(NamedTuple):
    """A stretch of the collection that one worker turns into one part."""

    number: int
    doc_ids: list[str]
    texts: list[str]


def build_bm25(
    collection: Collection,
    folder: Path,
    analyzer: str = "english",
    memory: int = 4_000_000_000,
    num_proc: int = 1,
    progress: Callable[[int], object] = lambda done: None,
    range_docs: int = RANGE_DOCS,
) -> None:
    """Bring the index of `collection` in `folder` to its end; do nothing where it is there.

    Args:
        analyzer: a name of `open_analyzer`.
        memory: bytes that all processes together may take.
        num_proc: processes that analyse.
        progress: told how many more passages are done, as tqdm's `update` is.
        range_docs: most passages in a range.
    Raises:
        InputError: the folder holds an index of other settings, or a document id stands twice.
    """
    settings = {"format": FORMAT, "version": VERSION, "analyzer": analyzer, "source": corpus_source(collection)}
    if check_settings(folder / INDEX_FILE, settings):
        return
    with one_builder(folder):
        if not check_settings(folder / INDEX_FILE, settings):
            _build(collection, folder, settings, memory, num_proc, progress, range_docs)


def _build(
    collection: Collection,
    folder: Path,
    settings: dict[str, Any],
    memory: int,
    num_proc: int,
    progress: Callable[[int], object],
    range_docs: int,
) -> None:
    num_proc = max(1, min(num_proc, memory // (2 * WORKER_MEMORY)))
    # a range is held by the reader, in the queue and by its worker
    characters = max((memory - num_proc * WORKER_MEMORY) // (MEMORY_PER_CHARACTER * (num_proc + 1)), 1_000_000)
    parts = folder / "parts"
    # the ranges of a resumed build are those it began with, or its parts would not fit together
    cut = {"range_docs": range_docs, "range_characters": characters}
    begun = check_settings(parts / INDEX_FILE, settings)
    if begun is None:
        parts.mkdir(parents=True, exist_ok=True)
        write_json(parts / INDEX_FILE, settings | cut)
    else:
        cut = {name: begun[name] for name in cut}
    ranges = cut_ranges(collection.docs(), cut["range_docs"], cut["range_characters"])
    for done in build_parts(ranges, parts, settings["analyzer"], num_proc):
        progress(done)
    counts = merge_parts(parts, folder)
    write_json(folder / INDEX_FILE, settings | counts)
    shutil.rmtree(parts)


def cut_ranges(docs: Iterable[Doc], max_docs: int, max_characters: int) -> Iterator[Range]:
    """Cut a collection into ranges of at most `max_docs` passages and about `max_characters` characters."""
    number, doc_ids, texts, characters = 0, [], [], 0
    for doc in docs:
        doc_ids.append(doc.doc_id)
        texts.append(doc.text)
        characters += len(doc.text)
        if len(texts) == max_docs or characters >= max_characters:
            yield Range(number, doc_ids, texts)
            number, doc_ids, texts, characters = number + 1, [], [], 0
    if texts:
        yield Range(number, doc_ids, texts)


def build_parts(ranges: Iterator[Range], parts: Path, analyzer: str, num_proc: int) -> Iterator[int]:
    """Write the part of every range that has none yet; yield the passages of each as it is there."""
    first = list(itertools.islice(ranges, 2))
    ranges = itertools.chain(first, ranges)
    if num_proc == 1 or len(first) == 1:  # starting processes would take longer than the work
        build = PartBuilder(analyzer, parts)
        yield from (len(part.texts) if is_done(parts, part) else build(part) for part in ranges)
        return
    with worker_pool(num_proc, _start_builder, (analyzer, parts)) as pool:
        waiting: list[Future[int]] = []
        try:
            for part in ranges:
                if is_done(parts, part):
                    yield len(part.texts)
                    continue
                waiting.append(pool.submit(_build_in_worker, part))
                if len(waiting) > num_proc:  # one range waits in the queue: enough, and it bounds the memory
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def part_folder(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}"


def is_done(parts: Path, part: Range) -> bool:
    return part_folder(parts, part.number).is_dir()


class TermIds(dict[str, int]):
    """Word -> the id of its term within one part, or -1 for a dropped word; filled as words are met."""

    def __init__(self, analyzer: Analyzer) -> None:
        self.analyzer = analyzer
        self.ids: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        term = self.analyzer.term(word)
        self[word] = number = self.ids.setdefault(term, len(self.ids)) if term else -1
        return number


class PartBuilder:
    """Turns ranges into parts."""

    def __init__(self, analyzer: str, parts: Path) -> None:
        self.analyzer = open_analyzer(analyzer)
        self.parts = parts

    def __call__(self, part: Range) -> int:
        ids = TermIds(self.analyzer)
        words = self.analyzer.words
        rows = [[ids[word] for word in words(text)] for text in part.texts]
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
        ends = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        del rows
        kept = flat >= 0
        ends = np.concatenate([[0], np.cumsum(kept)])[ends]  # the dropped words count neither as terms nor as length
        flat = flat[kept]
        counts = csr_array(
            (np.ones(len(flat), np.int32), flat, ends), shape=(len(part.texts), len(ids.ids))
        ).tocsc()  # sorts by term and, within it, by passage
        counts.sum_duplicates()
        with atomic_folder(part_folder(self.parts, part.number)) as folder:
            write_texts(folder / "doc_ids.arrow", part.doc_ids)
            write_texts(folder / "terms.arrow", list(ids.ids))
            np.save(folder / "offsets.npy", counts.indptr.astype(np.int64))
            np.save(folder / "docs.npy", counts.indices.astype(np.int32))
            np.save(folder / "freqs.npy", _narrow(counts.data))
            np.save(folder / "lengths.npy", np.diff(ends).astype(np.int32))
        return len(part.texts)


def _narrow(freqs: np.ndarray) -> np.ndarray:
    return freqs.astype(_freq_type(int(freqs.max(initial=0))))


def _freq_type(largest: int) -> type[np.generic]:
    return np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32


_builder: PartBuilder


def _start_builder(analyzer: str, parts: Path) -> None:
    global _builder
    _builder = PartBuilder(analyzer, parts)


def _build_in_worker(part: Range) -> int:
    return _builder(part)


def merge_parts(parts: Path, folder: Path) -> dict[str, int]:
    """Merge all parts into the index's files and return its counts; begun anew after an interruption."""
    folders = sorted(path for path in parts.iterdir() if path.is_dir() and not path.name.startswith("."))
    doc_ids = pa.concat_arrays([read_texts(path / "doc_ids.arrow") for path in folders])
    check_unique(doc_ids)
    write_texts(folder / "doc_ids.arrow", doc_ids)
    part_terms = [read_texts(path / "terms.arrow") for path in folders]
    coded = pa.concat_arrays(part_terms).dictionary_encode()
    vocabulary = coded.dictionary
    if not len(vocabulary):
        raise InputError("no passage of the collection holds a term to index; is --analyzer right for its language?")
    order = pc.sort_indices(vocabulary).to_numpy()
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    write_texts(folder / "terms.arrow", vocabulary.take(order))

    ends = np.cumsum([len(terms) for terms in part_terms])
    terms = np.split(rank[coded.indices.to_numpy()], ends[:-1])  # per part: its terms' places in the vocabulary
    del part_terms, coded
    sizes = np.zeros(len(order), np.int64)
    largest = 0
    for path, places in zip(folders, terms, strict=True):
        sizes[places] += np.diff(map_array(path / "offsets.npy"))
        largest = max(largest, int(map_array(path / "freqs.npy").max(initial=0)))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    np.save(folder / "offsets.npy", offsets)
    docs = _new_array(folder / "docs.npy", np.int32, int(offsets[-1]))
    freqs = _new_array(folder / "freqs.npy", _freq_type(largest), int(offsets[-1]))
    free, first_row, lengths = offsets[:-1].copy(), 0, []
    for path, places in zip(folders, terms, strict=True):
        part_offsets = map_array(path / "offsets.npy")
        part_sizes = np.diff(part_offsets)
        # posting j of a part's term goes to the term's first free place + j
        target = np.arange(part_offsets[-1]) + np.repeat(free[places] - part_offsets[:-1], part_sizes)
        docs[target] = map_array(path / "docs.npy") + np.int32(first_row)
        freqs[target] = map_array(path / "freqs.npy")
        free[places] += part_sizes
        lengths.append(np.array(map_array(path / "lengths.npy")))
        first_row += len(lengths[-1])
    docs.flush()
    freqs.flush()
    all_lengths = np.concatenate(lengths).astype(np.int64)
    np.save(folder / "lengths.npy", (np.searchsorted(LENGTHS, all_lengths, side="right") - 1).astype(np.uint8))
    return {
        "passages": first_row,
        "passages_with_terms": int((all_lengths > 0).sum()),
        "tokens": int(all_lengths.sum()),
        "terms": len(order),
        "postings": int(offsets[-1]),
    }


def _new_array(path: Path, dtype: type[np.generic], size: int) -> np.memmap:
    return np.lib.format.open_memmap(path, "w+", dtype, (size,))

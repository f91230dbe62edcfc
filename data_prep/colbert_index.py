"""Build an index of token vectors: chunk by chunk, resumable after any kill, over several processes, appendable.

A chunk is a folder that is there whole or not at all. Under `accelerate launch` each process encodes every n-th chunk
on its own device; the first process also trains the codec, and joins what all have written.

The index (arrays little-endian and memory-mapped):
`plan.json`             format, version, settings, and which collection begins at which chunk
`codec.safetensors`     centroids, transform and codewords (engine plaid)
`chunks/000000/`        `doc_ids.arrow`; `lengths.npy` int32 [passages], vectors of each; and either `vectors.npy`
                        float16 [vectors, dim] (engine exact) or `codes.npy` int32 [vectors], `residuals.npy`
                        uint8 [vectors, dim * bits / 8] and `scales.npy` float16 [vectors] (engine plaid)
`doc_ids.arrow`         id by row, over all chunks
`fast-plaid/`           the package's own files (engine fast-plaid, whose chunks are those of engine exact)
`list_offsets.npy`      int64 [centroids + 1], and `list_rows.npy` int32: the passages of each centroid (engine plaid)
`index.json`            the plan and the counts; written last
"""

import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from scipy.sparse import csc_array, csr_array

from setenc_hf.collection import Collection, Doc, LocalCollection
from setenc_hf.errors import InputError
from setenc_hf.files import PARTIAL, shared_folder

from .index_files import (
    INDEX_FILE,
    check_settings,
    check_unique,
    corpus_source,
    map_array,
    one_builder,
    process_rank,
    read_texts,
    write_json,
    write_texts,
)
from .late_interaction import LateInteractionEncoder
from .residual_codec import SAMPLES_PER_CENTROID, ResidualCodec, centroids_for

FORMAT, VERSION = "late-interaction", 2
CHUNK_PASSAGES = 5000
Item = TypeVar("Item")
PLAN_FILE, CODEC_FILE = "plan.json", "codec.safetensors"


def build_colbert(
    collection: Collection,
    folder: Path,
    encoder: LateInteractionEncoder,
    engine: str = "plaid",
    bits: int = 8,
    append: bool = False,
    chunk_passages: int = CHUNK_PASSAGES,
    batch_size: int = 64,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Bring the index of `collection` in `folder` to its end; do nothing where it is there.

    Args:
        engine: "exact" keeps the vectors in float16, "plaid" compresses them, "fast-plaid" does both.
        bits: of a dimension's residual, 1, 2, 4 or 8; not used by "exact".
        append: add the passages whose ids an existing index lacks, with its codec.
        chunk_passages: passages that are lost when the process is killed; those of an index begun are kept.
        progress: told how many more passages are done.
    """
    settings = {"format": FORMAT, "version": VERSION, "engine": engine, "bits": 16 if engine == "exact" else bits}
    settings |= {"dim": encoder.dim, "model": encoder.fingerprint}
    plan = check_settings(folder / PLAN_FILE, settings)
    if plan is not None and finished(folder, plan) and corpus_source(collection) in planned_sources(folder):
        return
    with one_builder(folder) if process_rank()[0] == 0 else nullcontext():
        _build(collection, folder, encoder, settings, append, chunk_passages, batch_size, progress)


def _build(
    collection: Collection,
    folder: Path,
    encoder: LateInteractionEncoder,
    settings: dict[str, Any],
    append: bool,
    chunk_passages: int,
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    number, processes = process_rank()
    engine, bits, begun = settings["engine"], settings["bits"], time.time()
    source = corpus_source(collection)
    if number == 0:
        plan = make_plan(folder, settings, collection, append, chunk_passages)
        if finished(folder, plan):
            return
        if engine == "plaid" and not (folder / CODEC_FILE).exists():
            train_codec(collection, encoder, bits, batch_size).save(folder / CODEC_FILE)
    wait_for(lambda: source in planned_sources(folder) and (engine != "plaid" or (folder / CODEC_FILE).exists()))
    plan = check_settings(folder / PLAN_FILE, settings) or {}
    if finished(folder, plan):
        return
    codec = ResidualCodec.load(folder / CODEC_FILE).to(encoder.device) if engine == "plaid" else None
    first = plan["sources"][-1]["first_chunk"]
    known = {doc_id for chunk in chunk_folders(folder)[:first] for doc_id in read_ids(chunk)}
    docs = (doc for doc in collection.docs() if doc.doc_id not in known)
    count = first
    for chunk, batch in enumerate(batches(docs, plan["chunk_passages"]), start=first):
        count = chunk + 1
        path = folder / "chunks" / f"{chunk:06d}"
        if chunk % processes == number and not path.is_dir():
            write_chunk(path, batch, encoder, codec, batch_size)
        progress(len(batch))
    if number == 0:
        wait_for(lambda: len(chunk_folders(folder)) >= count)
        counts = join_chunks(folder, codec, begun)
        if engine == "fast-plaid":
            from .fast_plaid import build_index

            build_index(folder, list(passage_vectors(folder)), bits)
        write_json(folder / INDEX_FILE, plan | counts)


def make_plan(
    folder: Path, settings: dict, collection: Collection, append: bool, chunk_passages: int
) -> dict[str, Any]:
    """Return the plan of the index, written anew where there is none or where a collection is added."""
    source = corpus_source(collection)
    check_settings(folder / INDEX_FILE, settings)  # another retriever's index has no plan
    plan = check_settings(folder / PLAN_FILE, settings)
    is_known, is_whole = source in planned_sources(folder), plan is not None and finished(folder, plan)
    if plan is None:
        plan = settings | {"chunk_passages": chunk_passages, "sources": [{"source": source, "first_chunk": 0}]}
    elif is_known and (is_whole or source == plan["sources"][-1]["source"]):
        return plan
    elif not is_whole and (is_known or append):
        last = "its last collection is not indexed to the end"
        raise InputError(f"{folder}: {last}; give that one again, with --append, before another")
    elif not append:
        raise InputError(f"{folder}: holds an index of other passages; pass --append to add these, or name another")
    else:
        plan["sources"].append({"source": source, "first_chunk": len(chunk_folders(folder))})
    if isinstance(collection, LocalCollection):  # hours of encoding stand before what would find it otherwise
        ids = ([doc.doc_id for doc in docs] for docs in batches(collection.docs(), 100_000))
        check_unique(pa.concat_arrays([pa.array(part, pa.large_string()) for part in ids]))
    folder.joinpath("chunks").mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN_FILE, plan)
    return plan


def planned_sources(folder: Path) -> list[dict[str, str]]:
    """Return what identifies each collection of the plan, in the order in which they were added."""
    plan = check_settings(folder / PLAN_FILE, {}) or {"sources": []}
    return [begun["source"] for begun in plan["sources"]]


def finished(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether the joined files of the index hold all collections of the plan."""
    meta = check_settings(folder / INDEX_FILE, {})
    return meta is not None and meta["sources"] == plan["sources"]


def unfinished_chunks(folder: Path) -> list[Path]:
    """Return the chunks of the last collection where it is not indexed to the end."""
    plan = check_settings(folder / PLAN_FILE, {})
    if plan is None or finished(folder, plan):
        return []
    return chunk_folders(folder)[plan["sources"][-1]["first_chunk"] :]


def train_codec(collection: Collection, encoder: LateInteractionEncoder, bits: int, batch_size: int) -> ResidualCodec:
    """Fit a codec to the vectors of passages drawn evenly from the collection."""
    passages = collection.count() or sum(1 for _ in collection.docs())
    first = encoder.encode_passages([doc.text for doc in itertools.islice(collection.docs(), 200)], batch_size)
    mean = sum(map(len, first)) / len(first)
    num_centroids = centroids_for(passages * mean)
    step = max(int(passages * mean / (SAMPLES_PER_CENTROID * num_centroids)), 1)
    texts = (doc.text for doc in itertools.islice(collection.docs(), 0, None, step))
    vectors = torch.cat([torch.cat(encoder.encode_passages(batch, batch_size)) for batch in batches(texts, 1000)])
    return ResidualCodec.train(vectors, min(num_centroids, len(vectors)), bits)


def write_chunk(
    path: Path, docs: list[Doc], encoder: LateInteractionEncoder, codec: ResidualCodec | None, batch_size: int
) -> None:
    """Encode passages and write their chunk."""
    found = encoder.encode_passages([doc.text for doc in docs], batch_size)
    vectors = torch.cat(found)  # [vectors, dim]
    with shared_folder(path) as folder:  # a process of another command may be encoding the same
        write_texts(folder / "doc_ids.arrow", [doc.doc_id for doc in docs])
        np.save(folder / "lengths.npy", np.array([len(rows) for rows in found], np.int32))
        if codec is None:
            np.save(folder / "vectors.npy", vectors.half().numpy())
        else:
            coded = codec.encode(vectors.to(encoder.device))
            for name, array in zip(("codes", "residuals", "scales"), coded, strict=True):
                np.save(folder / f"{name}.npy", array.cpu().numpy())


def join_chunks(folder: Path, codec: ResidualCodec | None, begun: float) -> dict[str, int]:
    """Write what spans all chunks, the ids and the inverted lists, and return the counts.

    Args:
        begun: when the build began: parts of chunks from before are of a process that was killed.
    """
    chunks = chunk_folders(folder)
    for left in (folder / "chunks").glob(f"*{PARTIAL}"):
        if left.stat().st_mtime < begun:
            shutil.rmtree(left)
    (folder / INDEX_FILE).unlink(missing_ok=True)  # it does not describe the files that are written now
    doc_ids = pa.concat_arrays([read_texts(chunk / "doc_ids.arrow") for chunk in chunks])
    check_unique(doc_ids)
    write_texts(folder / "doc_ids.arrow", doc_ids)
    counts = {
        "passages": len(doc_ids),
        "vectors": sum(int(map_array(chunk / "lengths.npy").sum()) for chunk in chunks),
        "chunks": len(chunks),
    }
    if codec is None:
        return counts
    sizes = sum(np.diff(chunk_lists(chunk, len(codec.centroids)).indptr).astype(np.int64) for chunk in chunks)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.lib.format.open_memmap(folder / "list_rows.npy", "w+", np.int32, (int(offsets[-1]),))
    free, first_row = offsets[:-1].copy(), 0
    for chunk in chunks:
        lists = chunk_lists(chunk, len(codec.centroids))
        sizes = np.diff(lists.indptr)
        rows[np.arange(len(lists.indices)) + np.repeat(free - lists.indptr[:-1], sizes)] = lists.indices + first_row
        free += sizes
        first_row += lists.shape[0]
    rows.flush()
    np.save(folder / "list_offsets.npy", offsets)
    return counts | {"centroids": len(codec.centroids)}


def chunk_lists(chunk: Path, num_centroids: int) -> csc_array:
    """Return [passages of the chunk, centroids]: which passages hold a vector of a centroid."""
    lengths, codes = map_array(chunk / "lengths.npy"), map_array(chunk / "codes.npy")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    lists = csr_array((np.ones(len(codes), np.int8), codes, ends), shape=(len(lengths), num_centroids)).tocsc()
    lists.sum_duplicates()
    return lists


def chunk_folders(folder: Path) -> list[Path]:
    """Return the chunks that are there, in their order."""
    return sorted(path for path in (folder / "chunks").iterdir() if path.name.isdigit())


def passage_vectors(folder: Path) -> Iterator[torch.Tensor]:
    """Yield each passage's vectors, float16 [tokens, dim], mapped from the chunks that keep them."""
    for chunk in chunk_folders(folder):
        vectors = np.load(chunk / "vectors.npy", mmap_mode="c")  # torch refuses arrays that cannot be written
        yield from torch.from_numpy(vectors).split(map_array(chunk / "lengths.npy").tolist())


def read_ids(chunk: Path) -> Iterator[str]:
    yield from read_texts(chunk / "doc_ids.arrow").to_pylist()


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def wait_for(there: Callable[[], bool]) -> None:
    """Wait for what another process writes; the launcher ends all processes when one of them fails."""
    while not there():
        time.sleep(0.5)

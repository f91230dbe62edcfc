"""Search token vectors by MaxSim: over all passages, or over the candidates of a compressed index.

MaxSim: Khattab and Zaharia, "ColBERT", SIGIR 2020. The stages of the compressed search (centroids, then scores from
the centroids alone, then restored vectors) follow Santhanam et al., "PLAID", CIKM 2022.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setenc_hf.collection import Collection
from setenc_hf.errors import InputError

from .colbert_index import CODEC_FILE, FORMAT, VERSION, batches, chunk_folders
from .fast_plaid import FastPlaidIndex
from .index_files import INDEX_FILE, check_settings, map_array, read_texts
from .late_interaction import LateInteractionEncoder
from .ranking import nth_best, rank
from .residual_codec import ResidualCodec

QUERIES_AT_ONCE = 8
VECTORS_AT_ONCE = 2**12  # restored and scored while they are in a processor's cache
Ranked = list[tuple[str, float]]


def max_sim(vectors: Tensor, lengths: np.ndarray, queries: Sequence[Tensor]) -> np.ndarray:
    """Return the sum over a query's vectors of the largest inner product with a passage's: float32 [queries, passages].

    Args:
        vectors: of all passages, one after the other: [vectors, dim].
        lengths: vectors of each passage, at least 1: [passages].
        queries: each [tokens, dim].
    """
    best = best_products((vectors @ torch.cat(list(queries)).T).numpy(), lengths)  # [passages, all query tokens]
    firsts = np.concatenate([[0], np.cumsum([len(query) for query in queries])[:-1]])
    return np.add.reduceat(best, firsts, axis=1).T


def best_products(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the largest of each passage's rows, [passages, tokens], of products [vectors, tokens]."""
    return np.maximum.reduceat(products, np.concatenate([[0], np.cumsum(lengths)[:-1]]), axis=0)


class Chunk:
    """The mapped arrays of a chunk, and where each of its passages begins."""

    def __init__(self, folder: Path, first_row: int) -> None:
        self.folder = folder
        self.first_row = first_row
        self.lengths = np.array(map_array(folder / "lengths.npy"))
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Return where the vectors of passages stand, passage after passage; `rows` count within the chunk."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        return np.arange(ends[-1]) + np.repeat(self.starts[rows] - (ends - lengths), lengths)

    def array(self, name: str) -> np.ndarray:
        return map_array(self.folder / f"{name}.npy")


class ColbertSearcher:
    """Searches the index in `folder` with vectors of queries; the engine is the index's.

    Args:
        probes: centroids that each vector of a query looks up; doubled until there are enough candidates.
        candidates: passages whose vectors are restored, of all that were looked up; at least 4 times the depth.
    """

    def __init__(self, folder: Path, probes: int = 16, candidates: int = 4000) -> None:
        meta = check_settings(folder / INDEX_FILE, {"format": FORMAT, "version": VERSION})
        if meta is None:
            raise InputError(f"{folder}: holds no complete index")
        self.doc_ids = read_texts(folder / "doc_ids.arrow")
        self.probes, self.candidates = probes, candidates
        self.chunks: list[Chunk] = []
        first_row = 0
        for path in chunk_folders(folder)[: meta["chunks"]]:
            self.chunks.append(Chunk(path, first_row))
            first_row += len(self.chunks[-1].lengths)
        self.engine: str = meta["engine"]
        if self.engine == "fast-plaid":
            self.fast_plaid = FastPlaidIndex(folder, probes, candidates)
        if self.engine == "plaid":
            self.codec = ResidualCodec.load(folder / CODEC_FILE)
            self.list_offsets = map_array(folder / "list_offsets.npy")
            self.list_rows = map_array(folder / "list_rows.npy")

    def search(self, queries: Sequence[Tensor], depth: int) -> Iterator[Ranked]:
        """Yield, for each query [tokens, dim], up to `depth` (doc_id, score), best first, ties in order of doc_id."""
        if self.engine == "plaid":
            threads = torch.get_num_threads()
            # a query a thread: its many small products are not worth sharing, and no bit depends on how many threads
            try:
                with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    yield from pool.map(lambda query: self._search_compressed(query, depth), queries)
            finally:
                torch.set_num_threads(threads)  # the setting is one for all threads
            return
        if self.engine == "fast-plaid":
            for rows, scores in self.fast_plaid.search(queries, depth):
                yield rank(self.doc_ids, rows, scores, depth)
            return
        every = np.arange(len(self.doc_ids))
        for block in batches(queries, QUERIES_AT_ONCE):
            vectors = ((torch.from_numpy(chunk.array("vectors").astype(np.float32)), chunk) for chunk in self.chunks)
            scores = np.concatenate([max_sim(found, chunk.lengths, block) for found, chunk in vectors], axis=1)
            yield from (rank(self.doc_ids, every, row, depth) for row in scores)

    def _search_compressed(self, query: Tensor, depth: int) -> Ranked:
        near = query @ self.codec.centroids.T  # [tokens, centroids]
        limit = min(max(self.candidates, 4 * depth), len(self.doc_ids))
        probes = self.probes
        while True:
            probed = near.topk(min(probes, near.shape[1]), dim=1).indices.unique().tolist()
            lists = [self.list_rows[self.list_offsets[number] : self.list_offsets[number + 1]] for number in probed]
            rows = np.unique(np.concatenate(lists))
            if len(rows) >= limit or probes >= near.shape[1]:
                break
            probes *= 2
        by_centroid = near.T.contiguous().numpy()  # [centroids, tokens]
        if len(rows) > limit:
            rough = np.concatenate([self._rough_scores(by_centroid, *found) for found in self._by_chunk(rows)])
            rows = rows[rough >= nth_best(rough, limit)]
        scores = np.concatenate([self._restored_scores(query, *found) for found in self._by_chunk(rows)])
        return rank(self.doc_ids, rows, scores, depth)

    def _by_chunk(self, rows: np.ndarray) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Yield each chunk that holds some of `rows` (ascending), with their rows within it."""
        bounds = np.searchsorted(rows, [chunk.first_row for chunk in self.chunks])
        for chunk, start, end in zip(self.chunks, bounds, [*bounds[1:], len(rows)]):
            if start < end:
                yield chunk, rows[start:end] - chunk.first_row

    @staticmethod
    def _rough_scores(by_centroid: np.ndarray, chunk: Chunk, rows: np.ndarray) -> np.ndarray:
        """Score passages as if each vector were its centroid."""
        products = by_centroid[chunk.array("codes")[chunk.places(rows)]]  # [vectors, tokens]
        return best_products(products, chunk.lengths[rows]).sum(axis=1)

    def _restored_scores(self, query: Tensor, chunk: Chunk, rows: np.ndarray) -> np.ndarray:
        places = chunk.places(rows)
        coded = [torch.from_numpy(chunk.array(name)[places]) for name in ("codes", "residuals", "scales")]
        mapped = self.codec.map_queries(query).T
        blocks = zip(*(array.split(VECTORS_AT_ONCE) for array in coded))
        products = torch.cat([self.codec.decode(*block) @ mapped for block in blocks])  # [vectors, tokens]
        return best_products(products.numpy(), chunk.lengths[rows]).sum(axis=1)


def search_collection(
    collection: Collection, encoder: LateInteractionEncoder, queries: Sequence[Tensor], depth: int
) -> list[Ranked]:
    """Search exactly, encoding the whole collection again and keeping no vector: what a compressed index is held to."""
    best: list[Ranked] = [[] for _ in queries]
    for docs in batches(collection.docs(), 1000):
        found = encoder.encode_passages([doc.text for doc in docs])
        scores = max_sim(torch.cat(found), np.array([len(rows) for rows in found]), queries)
        for number, row in enumerate(scores):
            pairs = best[number] + list(zip([doc.doc_id for doc in docs], row.tolist()))
            best[number] = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:depth]
    return best


def overlap(found: Ranked, exact: Ranked) -> float:
    """Return which part of the exact list's passages the other list holds."""
    return len({doc_id for doc_id, _ in found} & {doc_id for doc_id, _ in exact}) / max(len(exact), 1)

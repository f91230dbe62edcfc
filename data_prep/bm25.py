"""Search a BM25 index, with Lucene's arithmetic and Anserini's order of ties.

BM25: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, in the form Lucene
computes it: no factor (k1 + 1), lengths rounded to one byte, float32 for a term and float64 for their sum.
"""

from bisect import bisect_left
from collections import Counter
from pathlib import Path
from threading import local

import numpy as np

from setenc_hf.errors import InputError

from .analysis import open_analyzer
from .bm25_index import FORMAT, LENGTHS, VERSION
from .index_files import INDEX_FILE, check_settings, map_array, read_texts
from .ranking import nth_best, rank


def check_parameters(k1: float, b: float) -> None:
    """Raise `InputError` where BM25 is not defined for these parameters."""
    if not (0 <= k1 < float("inf") and 0 <= b <= 1):
        raise InputError(f"--k1 is at least 0 and --b between 0 and 1, got {k1:g} and {b:g}")


class Bm25Searcher:
    """Searches the index in `folder`; k1 and b are chosen here, not when the index is built. Safe for threads."""

    def __init__(self, folder: Path, k1: float = 0.9, b: float = 0.4) -> None:
        check_parameters(k1, b)
        meta = check_settings(folder / INDEX_FILE, {"format": FORMAT, "version": VERSION})
        if meta is None:
            raise InputError(f"{folder}: holds no complete index")
        self.analyzer = open_analyzer(meta["analyzer"])
        self.num_passages: int = meta["passages"]
        self.num_with_terms: int = meta["passages_with_terms"]
        self.doc_ids = read_texts(folder / "doc_ids.arrow")
        self.vocabulary = read_texts(folder / "terms.arrow")
        self.offsets = map_array(folder / "offsets.npy")
        self.docs = map_array(folder / "docs.npy")
        self.freqs = map_array(folder / "freqs.npy")
        average = np.float32(meta["tokens"] / self.num_with_terms)
        with np.errstate(divide="ignore"):  # k1 = 0 makes a term's count irrelevant, as it should
            norms = np.float32(1) / (
                np.float32(k1) * (np.float32(1 - b) + np.float32(b) * LENGTHS.astype(np.float32) / average)
            )
        self.norms = norms[map_array(folder / "lengths.npy")]  # float32 [passages]
        self._thread = local()

    def postings(self, term: str) -> slice:
        """Return where a term's postings stand; an empty slice for a term the index lacks."""
        place = bisect_left(self.vocabulary, term, key=lambda found: found.as_py())
        if place == len(self.vocabulary) or self.vocabulary[place].as_py() != term:
            return slice(0, 0)
        return slice(int(self.offsets[place]), int(self.offsets[place + 1]))

    def search(self, query: str, depth: int) -> list[tuple[str, float]]:
        """Return up to `depth` (doc_id, score), best first; ties in order of doc_id, as Anserini breaks them.

        A passage that shares no term with the query is never returned.
        """
        if not hasattr(self._thread, "scores"):
            self._thread.scores = np.zeros(self.num_passages)
        scores: np.ndarray = self._thread.scores  # float64 [passages], all 0 between two queries
        found: list[np.ndarray] = []
        for term, count in sorted(Counter(self.analyzer.terms(query)).items()):
            where = self.postings(term)
            docs = self.docs[where]
            if len(docs):
                idf = np.float32(np.log(1 + (self.num_with_terms - len(docs) + 0.5) / (len(docs) + 0.5)))
                weight = np.float32(count) * idf
                freqs = self.freqs[where].astype(np.float32, copy=False)
                scores[docs] += weight - weight / (np.float32(1) + freqs * self.norms[docs])
                found.append(docs)
        rows = _contenders(scores, found, depth)
        best = scores[rows].astype(np.float32)
        for docs in found:
            scores[docs] = 0
        return rank(self.doc_ids, rows, best, depth)


def _contenders(scores: np.ndarray, found: list[np.ndarray], depth: int) -> np.ndarray:
    """Return rows among which are the `depth` best and all that tie with the last of them.

    The depth-th best score among the passages of one term is a lower bound of the depth-th best of all, so that only
    few passages need to be gathered and sorted.
    """
    long = min((docs for docs in found if len(docs) >= depth), key=len, default=None)
    bound = np.float32(0) if long is None else nth_best(scores[long].astype(np.float32), depth)
    kept = [docs[scores[docs].astype(np.float32) >= bound] for docs in found]
    return np.unique(np.concatenate(kept)) if kept else np.zeros(0, np.int32)

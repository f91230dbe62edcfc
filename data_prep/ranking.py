"""The best passages of one query, with the order of ties that all retrievers share."""

import numpy as np
import pyarrow as pa


def nth_best(values: np.ndarray, n: int) -> np.float32:
    """Return the n-th largest value, n from 1."""
    return np.partition(values, len(values) - n)[len(values) - n]


def rank(doc_ids: pa.LargeStringArray, rows: np.ndarray, scores: np.ndarray, depth: int) -> list[tuple[str, float]]:
    """Return up to `depth` (doc_id, score), best first, ties in order of doc_id.

    Args:
        doc_ids: id by row, of the whole collection.
        rows: integers [candidates].
        scores: float32 [candidates].
    """
    if len(rows) > depth:
        kept = scores >= nth_best(scores, depth)  # with all that tie with the last, for the ids to decide
        rows, scores = rows[kept], scores[kept]
    pairs = zip(doc_ids.take(pa.array(rows)).to_pylist(), scores.tolist())
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:depth]

"""Which passages of a stored list a training step sees: five strategies, in the field's names.

A draw depends on (seed, epoch, query) alone: a resumed run, another number of workers or processes, and another order
of the queries all see the same samples.
"""

import zlib
from collections.abc import Callable

import numpy as np

Draw = np.random.Generator
Places = np.ndarray  # int, places in the stored list


def generator(seed: int, epoch: int, query_id: str) -> Draw:
    """Return the random numbers of one query in one epoch."""
    return np.random.default_rng([seed, epoch, zlib.crc32(query_id.encode())])


def top(draw: Draw, ranks: np.ndarray, labels: np.ndarray, size: int) -> Places:
    """The first `size` passages of the list."""
    return _best_first(ranks)[:size]


def random(draw: Draw, ranks: np.ndarray, labels: np.ndarray, size: int) -> Places:
    """`size` passages, each as likely as any other."""
    return draw.permutation(len(ranks))[:size]


def log_random(draw: Draw, ranks: np.ndarray, labels: np.ndarray, size: int) -> Places:
    """`size` passages, a passage the less likely the deeper it stands: weight 1 / log2(1 + place)."""
    order = _best_first(ranks)
    weights = 1 / np.log2(1 + np.arange(1, len(order) + 1))
    # the smallest of exponential waiting times with these rates: a weighted draw without replacement
    return order[np.argsort(draw.exponential(size=len(order)) / weights)[:size]]


def single_relevant(draw: Draw, ranks: np.ndarray, labels: np.ndarray, size: int) -> Places:
    """One relevant passage (a label above 0) and `size - 1` of the non-relevant ones, each as likely as any other."""
    relevant, others = np.flatnonzero(labels > 0), np.flatnonzero(labels <= 0)
    if not len(relevant):
        return others[:0]
    return np.concatenate([draw.choice(relevant, 1), draw.permutation(others)[: size - 1]])


def top_and_random(draw: Draw, ranks: np.ndarray, labels: np.ndarray, size: int) -> Places:
    """The first half of `size` from the top of the list, the rest drawn from below."""
    order = _best_first(ranks)
    head = (size + 1) // 2
    return np.concatenate([order[:head], draw.permutation(order[head:])[: size - head]])


def _best_first(ranks: np.ndarray) -> Places:
    """Order the list by rank; a passage that was not retrieved (rank 0) comes last."""
    return np.argsort(np.where(ranks > 0, ranks, np.iinfo(np.int32).max), kind="stable")


STRATEGIES: dict[str, Callable[[Draw, np.ndarray, np.ndarray, int], Places]] = {
    "top": top,
    "random": random,
    "log_random": log_random,
    "single_relevant": single_relevant,
    "top_and_random": top_and_random,
}

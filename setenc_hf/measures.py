"""Effectiveness by `ir_measures`, and whether a difference between two runs is more than chance."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np

from .errors import InputError
from .trec import Qrel, RankedList

Scores = Mapping[str, Mapping[str, float]]  # query_id -> doc_id -> score
DRAWN_AT_A_TIME = 1 << 20  # differences of queries in memory at once


def parse_measures(names: Sequence[str]) -> dict[str, Any]:
    """Return the measures by these names, such as `nDCG@10`, `MRR@10`, `RR(rel=2)@10`, `P@10`, `R@100`, `AP`.

    Raises `InputError` for a name that is no measure of `ir_measures`, or one that needs a package that is absent.
    """
    measures = {}
    for name in names:
        try:
            measures[name] = ir_measures.parse_measure(name)
        except (NameError, ValueError, SyntaxError, TypeError) as error:
            raise InputError(
                f"{name!r} is no measure of ir_measures ({error}); for example nDCG@10, MRR@10, R@100"
            ) from None
        pipeline = ir_measures.DefaultPipeline
        if not pipeline.supports(measures[name]):
            able = (provider for provider in pipeline.providers if provider.supports(measures[name]))
            how = " or ".join(filter(None, (provider.install_instructions() for provider in able)))
            raise InputError(f"{name!r} needs a package that is not installed: {how or 'none is known'}")
    return measures


def run_scores(lists: Iterable[RankedList]) -> dict[str, dict[str, float]]:
    """Return a run's scores; ties are resolved as the list has them, not by the documents' names."""
    return {query_id: _by_place(line.doc_id for line in lines) for query_id, lines in lists}


def ordered(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores of the same order, in which ties are resolved as the documents stand, as `write_run` does it.

    Two passages of the same words have the same score, and `ir_measures` would put the later name first: what an
    evaluation of scores reports would not be that of the run written from them.
    """
    return _by_place(sorted(scores, key=lambda doc_id: -scores[doc_id]))


def _by_place(doc_ids: Iterable[str]) -> dict[str, float]:
    """Return scores that fall from document to document, so that no rule for ties applies."""
    return {doc_id: float(-place) for place, doc_id in enumerate(doc_ids)}


def per_query(measures: Mapping[str, Any], qrels: Sequence[Qrel], run: Scores) -> dict[str, dict[str, float]]:
    """Return each measure's value for each judged query: measure name -> query_id -> value.

    A judged query that the run lacks counts with 0 (or the measure's own value for nothing found), as in trec_eval
    with `-c`; a query of the run without judgements does not count.
    """
    values: dict[Any, dict[str, float]] = {measure: {} for measure in measures.values()}
    for metric in ir_measures.iter_calc(list(values), [ir_qrel(qrel) for qrel in qrels], run):
        values[metric.measure][metric.query_id] = metric.value
    return {name: values[measure] for name, measure in measures.items()}


def ir_qrel(qrel: Qrel) -> ir_measures.Qrel:
    """Return a judgement as `ir_measures` takes it."""
    return ir_measures.Qrel(qrel.query_id, qrel.doc_id, qrel.relevance, qrel.iteration)


def mean(values: Mapping[str, float]) -> float:
    """Return the mean over queries."""
    return float(np.mean(list(values.values())))


@dataclass(frozen=True)
class Comparison:
    """A run against a baseline on the same queries."""

    difference: float  # mean of the run minus mean of the baseline
    low: float  # 95 % paired bootstrap interval of the difference
    high: float
    p_value: float  # two-sided paired randomisation test
    wins: int  # queries on which the run is better
    losses: int


def compare(run: Mapping[str, float], baseline: Mapping[str, float], draws: int = 10_000, seed: int = 42) -> Comparison:
    """Compare two runs query by query.

    The p-value is that of Fisher's two-sided randomisation test, the interval a percentile bootstrap over queries
    (Smucker et al. 2007, "A comparison of statistical significance tests for information retrieval evaluation").
    """
    query_ids = sorted(run.keys() & baseline.keys())
    differences = np.array([run[query_id] - baseline[query_id] for query_id in query_ids])
    draw, count = np.random.default_rng(seed), len(differences)
    rows = max(DRAWN_AT_A_TIME // max(count, 1), 1)
    sizes = [(min(rows, draws - start), count) for start in range(0, draws, rows)]
    observed = abs(differences.mean()) - 1e-12
    extreme = 0
    for size in sizes:
        signs = draw.choice([-1.0, 1.0], size=size)
        extreme += (np.abs((signs * differences).mean(axis=1)) >= observed).sum()
    resampled = np.concatenate([differences[draw.integers(count, size=size)].mean(axis=1) for size in sizes])
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Comparison(
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        p_value=float((extreme + 1) / (draws + 1)),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
    )

"""Merge runs into one: `python -m data_prep.merge_runs --runs R1 R2 [R3 ...] --output R`.

`rrf` is reciprocal-rank fusion (Cormack et al., SIGIR 2009): a passage scores the sum of 1 / (k + rank) over the runs
that list it. `linear` interpolates: the sum of `--weights` times the scores, as they stand in the runs; a passage that
a run does not list has the lowest score that this run gives its query. `concatenate` puts the lists of a query one
below the other, each passage where it comes first; runs of different queries simply come together. Runs may be larger
than memory: their lines wait on disk beside the output.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import partial_folder
from setenc_hf.trec import write_run

from .run_spill import RunSpill

METHODS = ("rrf", "linear", "concatenate")


def fuse(lists: Sequence[Sequence[str]], k: float = 60) -> list[tuple[str, float]]:
    """Return (doc_id, score), best first, of lists of document ids; ties go to what the earlier list ranks higher."""
    scores: dict[str, float] = {}
    for doc_ids in lists:
        for rank, doc_id in enumerate(doc_ids, start=1):
            scores[doc_id] = scores.get(doc_id, 0.0) + 1 / (k + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def interpolate(lists: Sequence[dict[str, float]], weights: Sequence[float]) -> list[tuple[str, float]]:
    """Return (doc_id, score), best first, of lists doc_id -> score, any of which may be empty.

    A passage scores the weighted sum, with a list's lowest score where the list lacks it; ties go to what the earlier
    list ranks higher.
    """
    scores = dict.fromkeys((doc_id for listed in lists for doc_id in listed), 0.0)
    for listed, weight in zip(lists, weights, strict=True):
        lowest = min(listed.values(), default=0.0)
        for doc_id in scores:
            scores[doc_id] += weight * listed.get(doc_id, lowest)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def concatenate(lists: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """Return (doc_id, score), best first: the lists in order, each document where it stands first."""
    doc_ids = list(dict.fromkeys(doc_id for listed in lists for doc_id in listed))
    return [(doc_id, float(len(doc_ids) - place)) for place, doc_id in enumerate(doc_ids)]


def gathered(spill: RunSpill) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Yield each query with its list by every run, doc_id -> score, best first; empty where a run lacks the query."""
    doc_ids = list(spill.docs)
    for lines in spill.buckets():
        for of_query in np.split(lines, np.flatnonzero(np.diff(lines["list"])) + 1):
            listed: list[dict[str, float]] = [{} for _ in spill.paths]
            rows = zip(of_query["run"].tolist(), of_query["doc"].tolist(), of_query["score"].tolist())
            for run, doc, score in rows:
                listed[run][doc_ids[doc]] = score
            yield spill.query_ids[of_query["list"][0]], listed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.merge_runs", description=__doc__)
    parser.add_argument("--runs", required=True, nargs="+", help="TREC runs to merge, at least two.")
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="How to merge the lists of a query (rrf)."
    )
    parser.add_argument("--k", type=float, default=60.0, help="The k of rrf (60): larger flattens the top ranks.")
    parser.add_argument("--weights", type=float, nargs="+", help="Weights of linear, one a run (default: 1 each).")
    parser.add_argument(
        "--first-only", action="store_true", help="Keep only the queries and passages that the first run lists."
    )
    parser.add_argument("--depth", type=int, help="Passages to keep per query (default: all).")
    parser.add_argument("--tag", help="Tag of the run's lines (default: the method).")
    parser.add_argument("--output", required=True, help="Run to write.")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise InputError("--runs needs at least two runs to merge")
    if args.k < 0 or (args.depth is not None and args.depth < 1):
        raise InputError("--k must be 0 or more and --depth at least 1")

    weights = args.weights or [1.0] * len(args.runs)
    if args.weights and args.method != "linear":
        raise InputError("--weights belongs to --method linear")
    if len(weights) != len(args.runs) or not all(map(math.isfinite, weights)):
        raise InputError(f"--weights needs a number for each of the {len(args.runs)} runs, got {weights}")

    def merge(listed: list[dict[str, float]]) -> list[tuple[str, float]]:
        if args.method == "linear":
            merged = interpolate(listed, weights)
        else:
            order = [list(scores) for scores in listed if scores]
            merged = fuse(order, args.k) if args.method == "rrf" else concatenate(order)
        if args.first_only:
            merged = [pair for pair in merged if pair[0] in listed[0]]
        return merged[: args.depth]

    queries = shared = found = 0

    def merged_lists(spill: RunSpill) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        nonlocal queries, shared, found
        for query_id, listed in gathered(spill):
            found += len(set().union(*listed))
            if args.first_only and not listed[0]:
                continue
            queries += 1
            shared += all(listed)
            yield query_id, merge(listed)

    output = Path(args.output)
    with partial_folder(output.with_name(f"{output.name}.lines")) as folder:
        spill = RunSpill(folder / "lines", merge=True)
        spill.read(args.runs)
        count = write_run(output, merged_lists(spill), args.tag or args.method)
    print(
        f"wrote {output}: {queries:,} queries, {shared:,} of them in every run, {count:,} lines; "
        f"left out {found - count:,} passages beyond --depth or --first-only"
    )


if __name__ == "__main__":
    run_command(main)

"""What `effectiveness.py` measured: kept as JSON, to which other seeds and other machines add, and its tables."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from setenc_hf.errors import InputError
from setenc_hf.evaluate import plot
from setenc_hf.files import atomic_file
from setenc_hf.measures import Comparison, compare, mean

from .report import processor, table

MEASURES = ("nDCG@10", "MRR@10")
MAIN = MEASURES[0]
BI_ENCODER = "bi-encoder"
# the states of a system, by the names of their folders: after each stage, and the mean of those and of the backbone
STATES = {"stage1": "stage 1", "stage2": "stage 2", "mean": "weights averaged"}
DIGITS = 6
Values = dict[str, dict[str, float]]  # measure -> query_id -> value


class Reranked(NamedTuple):
    """A run as a system re-ranked it: the values are means over its seeds, and without training there is one."""

    name: str
    values: Values
    of_seeds: list[float]  # the main measure's mean over queries, seed by seed; empty without training
    seconds: float | None  # of training, the mean over seeds; None where nothing was trained


class Results:
    """Values per query of every run, and the seconds of every training.

    A run is named `bm25` as the first stage made it, `bi-encoder/bm25-100` re-ranked by the backbone to depth 100, and
    `set-encoder-1/stage2/bm25-100` by what was trained with seed 1.

    Args:
        method: what stands for the recipes and samples; figures of different ones must not come into one table.
        path: JSON file to go on with and to keep them in.

    Raises `InputError` where the file holds results of another method.
    """

    def __init__(self, method: str, path: Path | None = None) -> None:
        self.method, self.path = method, path
        self.runs: dict[str, Values] = {}
        self.trainings: dict[str, dict[str, float | str]] = {}
        if path is not None and path.exists():
            found = json.loads(path.read_text("utf-8"))
            if found["method"] != method:
                raise InputError(f"{path}: holds results of other recipes or samples; name a new file with --results")
            self.runs, self.trainings = found["runs"], found["trainings"]

    def add_run(self, name: str, values: Values) -> None:
        self.runs[name] = {
            measure: {query_id: round(value, DIGITS) for query_id, value in sorted(queries.items())}
            for measure, queries in values.items()
        }

    def add_training(self, name: str, seconds: float) -> None:
        """Add the seconds of a training on this machine; one that is known stays as it is."""
        self.trainings.setdefault(name, {"seconds": round(seconds, 1), "processor": processor()})

    def save(self) -> None:
        """Write the file, a line for each training and each run."""
        if self.path is None:
            return
        parts = [f'"method": {json.dumps(self.method)}']
        for name, kept in (("trainings", self.trainings), ("runs", self.runs)):
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
            parts.append(f'"{name}": {{\n{lines}\n}}')
        with atomic_file(self.path) as file:
            file.write("{" + ",\n".join(parts) + "}\n")

    def seeds(self, system: str, state: str, run: str) -> list[int]:
        """Return the seeds of a system that have re-ranked a run."""
        names = (name.removeprefix(f"{system}-").split("/") for name in self.runs if name.startswith(f"{system}-"))
        return sorted(int(parts[0]) for parts in names if parts[1:] == [state, run])

    def systems(self, state: str, run: str) -> list[str]:
        """Return the systems that have re-ranked a run, in the order in which they were added."""
        names = dict.fromkeys(name.split("/")[0].rpartition("-")[0] for name in self.runs if name.count("/") == 2)
        return [system for system in names if self.seeds(system, state, run)]

    def seconds(self, names: Iterable[str]) -> float:
        """Return the mean seconds of some trainings."""
        return statistics.mean(float(self.trainings[name]["seconds"]) for name in names)

    def averaged(self, system: str, state: str, run: str, measure: str = MAIN) -> dict[str, float]:
        """Return the value of each query, the mean over seeds."""
        names = (f"{system}-{seed}/{state}/{run}" for seed in self.seeds(system, state, run))
        of_seeds = [self.runs[name][measure] for name in names]
        return {query_id: statistics.mean(values[query_id] for values in of_seeds) for query_id in of_seeds[0]}

    def reranked(self, run: str) -> Iterator[Reranked]:
        """Yield what re-ranked a run: the backbone, then the systems state by state."""
        if f"{BI_ENCODER}/{run}" in self.runs:
            yield Reranked("the backbone as bi-encoder", self.runs[f"{BI_ENCODER}/{run}"], [], None)
        for state, words in STATES.items():
            for system in self.systems(state, run):
                names = [f"{system}-{seed}/{state}" for seed in self.seeds(system, state, run)]
                yield Reranked(
                    f"{system}, {words}",
                    {measure: self.averaged(system, state, run, measure) for measure in MEASURES},
                    [mean(self.runs[f"{name}/{run}"][MAIN]) for name in names],
                    self.seconds(names) if names[0] in self.trainings else None,
                )


def main_table(results: Results, first_stages: Sequence[str], depth: int) -> str:
    """Return each system's means over seeds, their spread, and the difference to the first stage."""
    rows = []
    for first in first_stages:
        baseline = results.runs[first]
        rows.append([first, "as it is", *(f"{mean(baseline[name]):.4f}" for name in MEASURES), "", "", ""])
        for found in results.reranked(f"{first}-{depth}"):
            over = found.of_seeds
            spread = f"{max(over) - min(over):.4f} of {len(over)}" if len(over) > 1 else "one seed" * len(over)
            rows.append([
                first,
                found.name,
                *(f"{mean(found.values[name]):.4f}" for name in MEASURES),
                spread,
                interval(compare(found.values[MAIN], baseline[MAIN])),
                "" if found.seconds is None else f"{found.seconds:.0f}",
            ])  # fmt: skip
    header = ["first stage", "re-ranked by", *MEASURES, "max - min over seeds", f"{MAIN}, difference", "training s"]
    return table(header, rows)


def comparisons(results: Results, run: str) -> Iterator[tuple[str, str, Comparison]]:
    """Yield what is worth comparing on a run: each state with those before, the Set-Encoder with the others and with
    the bi-encoder."""
    states = list(STATES)
    for place, state in enumerate(states):
        for before in states[:place]:
            for system in results.systems(state, run):
                if results.seeds(system, before, run):
                    left, right = (results.averaged(system, one, run) for one in (state, before))
                    yield f"{system}, {STATES[state]}", STATES[before], compare(left, right)
    for state in states:
        systems = results.systems(state, run)
        if "set-encoder" not in systems:
            continue
        ours = results.averaged("set-encoder", state, run)
        for system in systems:
            if system != "set-encoder":
                yield f"set-encoder, {STATES[state]}", system, compare(ours, results.averaged(system, state, run))
        if f"{BI_ENCODER}/{run}" in results.runs:
            bi_encoder = results.runs[f"{BI_ENCODER}/{run}"][MAIN]
            yield f"set-encoder, {STATES[state]}", BI_ENCODER, compare(ours, bi_encoder)


def comparison_table(results: Results, first_stages: Sequence[str], depth: int) -> str:
    """Return paired comparisons of the mean over seeds."""
    rows = [
        [first, left, right, interval(found), f"{found.p_value:.4f}", f"{found.wins} : {found.losses}"]
        for first in first_stages
        for left, right, found in comparisons(results, f"{first}-{depth}")
    ]
    return table(["first stage", "", "against", f"{MAIN}, difference", "p", "better : worse"], rows)


def depth_table(results: Results, pool: str, depths: Sequence[int]) -> str:
    """Return nDCG@10 against the number of passages re-ranked, of BM25's order of the judged passages."""
    rows = [["BM25's order", *[f"{mean(results.runs[pool][MAIN]):.4f}"] * len(depths)]]
    found = {depth: {one.name: one for one in results.reranked(f"{pool}-{depth}")} for depth in depths}
    for name in dict.fromkeys(name for by_name in found.values() for name in by_name):
        at = (found[depth].get(name) for depth in depths)
        rows.append([name, *(f"{mean(one.values[MAIN]):.4f}" if one else "" for one in at)])
    return table([f"{MAIN} at passages re-ranked", *map(str, depths)], rows)


def render(results: Results, first_stages: Sequence[str], depth: int, pool: str, depths: Sequence[int]) -> str:
    """Return all tables, and where was trained."""
    found = [first for first in first_stages if first in results.runs]
    parts = [main_table(results, found, depth), comparison_table(results, found, depth)]
    if any(name.rpartition("/")[2].startswith(f"{pool}-") for name in results.runs):
        parts.append(depth_table(results, pool, depths))
    processors = sorted({str(training["processor"]) for training in results.trainings.values()})
    if processors:
        parts.append(f"Trained on {'; '.join(processors)}.")
    return "\n\n".join(parts)


def draw(results: Results, path: Path, first: str, depth: int) -> None:
    """Draw the first stage and what re-ranks it, means over seeds."""
    baseline = results.runs[first]
    found = list(results.reranked(f"{first}-{depth}"))
    values = [one.values for one in found]
    compared = {measure: [compare(other[measure], baseline[measure]) for other in values] for measure in MEASURES}
    plot(path, [first, *(one.name for one in found)], [baseline, *values], compared)


def interval(found: Comparison) -> str:
    """Return a difference with its interval."""
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"

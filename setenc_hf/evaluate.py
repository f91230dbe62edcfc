"""Measure runs against judgements, side by side.

    python -m setenc_hf.evaluate --qrels qrels.txt --runs bm25.run reranked.run --measures nDCG@10 MRR@10

Every run is compared with the first: difference, 95 % paired bootstrap interval, p-value of a two-sided randomisation
test, and on how many queries it is better or worse.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from .command import run_command
from .errors import InputError
from .files import partial_path
from .measures import Comparison, compare, mean, parse_measures, per_query, run_scores
from .trec import read_lists, read_qrels

PerQuery = Mapping[str, Mapping[str, float]]  # measure -> query_id -> value


def table(names: Sequence[str], values: Sequence[PerQuery]) -> tuple[str, dict[str, list[Comparison]]]:
    """Return the table as text, and for each measure the comparisons of the later runs with the first."""
    measures = list(values[0])
    compared = {measure: [compare(other[measure], values[0][measure]) for other in values[1:]] for measure in measures}
    width = max(len(name) for name in [*names, "run"])
    lines = []
    for measure in measures:
        lines.append(f"{'run':<{width}}  {measure:>9}   difference  95 % interval       p      better/worse")
        lines.append(f"{names[0]:<{width}}  {mean(values[0][measure]):>9.4f}")
        for name, run, comparison in zip(names[1:], values[1:], compared[measure]):
            lines.append(
                f"{name:<{width}}  {mean(run[measure]):>9.4f}   {comparison.difference:>+10.4f}  "
                f"[{comparison.low:+.4f}, {comparison.high:+.4f}]  {comparison.p_value:.4f}  "
                f"{comparison.wins:>5}/{comparison.losses}"
            )
        lines.append("")
    return "\n".join(lines).rstrip(), compared


def plot(
    path: Path, names: Sequence[str], values: Sequence[PerQuery], compared: Mapping[str, list[Comparison]]
) -> None:
    """Draw a bar a run for every measure, with the interval of its difference to the first."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install 'setenc_hf[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = list(values[0])
    figure, axes = pyplot.subplots(
        1, len(measures), figsize=(1.5 + 4.2 * len(measures), 1.2 + 0.45 * len(names)), squeeze=False, sharey=True
    )
    for axis, measure in zip(axes[0], measures):
        means = [mean(run[measure]) for run in values]
        axis.barh(range(len(names)), means, color=["#9aa5b1", *["#2f6f9f"] * (len(names) - 1)], height=0.65)
        right = max(means)
        for place, comparison in enumerate(compared[measure], start=1):
            middle = means[place] - comparison.difference
            ends = [middle + comparison.low, middle + comparison.high]
            axis.plot(ends, [place, place], color="#1b1f23", lw=1.2)
            right = max(right, ends[1])
        right *= 1.2  # room for the figures
        for place, value in enumerate(means):
            axis.text(right * 0.995, place, f"{value:.3f}", va="center", ha="right", fontsize=9)
        axis.set(title=measure, yticks=range(len(names)), yticklabels=names, xlim=(0, right))
        axis.set_xticks([tick for tick in axis.get_xticks() if tick <= max(means) * 1.05])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    if len(values) > 1:
        figure.text(0.99, 0.01, "lines: 95 % interval of the difference to the first run", ha="right", fontsize=7)
    figure.tight_layout()
    partial = partial_path(path)
    figure.savefig(partial, dpi=160, format=path.suffix.lstrip(".") or "png")
    partial.replace(path)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m setenc_hf.evaluate", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--qrels", required=True, help="judgements (TREC, or BEIR's .tsv)")
    add("--runs", nargs="+", required=True, help="TREC runs; the first is what the others are compared with")
    add("--names", nargs="+", help="names of the runs in the table (default: the files' names)")
    add("--measures", nargs="+", default=["nDCG@10"], help="names of ir_measures (default: nDCG@10)")
    add("--plot", type=Path, help="draw the table as bars into this file (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    if args.names and len(args.names) != len(args.runs):
        raise InputError(f"--names gives {len(args.names)} names for {len(args.runs)} runs; give one each")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot writes .png, .svg or .pdf, got {args.plot}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    measures = parse_measures(args.measures)
    qrels = list(read_qrels(args.qrels))
    judged = {qrel.query_id for qrel in qrels}
    values, notes = [], []
    for path in args.runs:
        scores = run_scores(read_lists(path))
        if not judged & scores.keys():
            raise InputError(f"{path}: shares no query with {args.qrels}; do they belong together?")
        missing, unjudged = len(judged - scores.keys()), len(scores.keys() - judged)
        if missing:
            notes.append(f"{path}: lacks {missing} of {len(judged)} judged queries, which count as nothing found")
        if unjudged:
            notes.append(f"{path}: {unjudged} queries without judgements do not count")
        values.append(per_query(measures, qrels, scores))
    names = args.names or [Path(path).name for path in args.runs]
    text, compared = table(names, values)
    print(f"{len(judged)} judged queries\n{text}")
    for note in notes:
        print(f"note: {note}")
    if args.plot:
        plot(args.plot, names, values, compared)
        print(f"Drew {args.plot}")


if __name__ == "__main__":
    run_command(main)

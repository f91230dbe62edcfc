"""Tell what a folder of samples holds: `python -m data_prep.describe DIR [--lists 2] [--plot FILE]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.samples import ListwiseSamples

TEXT_WIDTH = 90
QUANTILES = (0, 0.25, 0.5, 0.75, 1)
LARGEST_GRADES = 20  # as many different labels are listed one by one, more as quantiles


class Distributions(NamedTuple):
    """What is told of a folder and drawn: passages of each list [lists], labels and ranks of all passages."""

    lengths: np.ndarray
    labels: np.ndarray
    ranks: np.ndarray


def distributions(samples: ListwiseSamples) -> Distributions:
    """Read the columns that are summed up."""
    table = samples.samples.data.table
    labels, ranks = (
        np.concatenate([np.asarray(chunk.flatten()) for chunk in table[name].chunks]) for name in ("labels", "ranks")
    )
    return Distributions(samples.list_lengths(), labels, ranks)


def spread(values: np.ndarray) -> str:
    """Return a mean and five quantiles in one line."""
    quantiles = "  ".join(f"{value:,.6g}" for value in np.quantile(values, QUANTILES))
    return f"mean {values.mean():,.4g}; least, quartiles, most: {quantiles}"


def summary(samples: ListwiseSamples) -> list[str]:
    """Return counts and distributions, a line each."""
    lengths, labels, ranks = distributions(samples)
    meta = samples.meta
    lines = [f"{samples.folder}: {len(samples):,} lists, labels of {meta['labels']}, made by {meta['made_by']}"]
    lines += [f"{count:>14,}  {reason}" for reason, count in meta["counts"].items()]
    lines.append(f"list lengths    {spread(lengths)}")
    grades, times = np.unique(labels, return_counts=True)
    if len(grades) <= LARGEST_GRADES:
        shares = "  ".join(f"{g:g}: {n:,} ({n / len(labels):.1%})" for g, n in zip(grades, times))
        lines.append(f"labels          {shares}")
    else:
        lines.append(f"labels          {spread(labels)}")
    retrieved = ranks[ranks > 0]
    if len(retrieved):
        lines.append(f"ranks           {spread(retrieved)}")
    if len(retrieved) < len(ranks):
        lines.append(f"                {len(ranks) - len(retrieved):,} passages were not retrieved (rank 0)")
    if meta["labels"] == "relevance":
        found = ranks[(labels > 0) & (ranks > 0)]
        lines.append(f"ranks of the relevant  {spread(found)}" if len(found) else "no relevant passage was retrieved")
    for kind, entries in meta["sources"].items():
        lines += [f"{kind:<15} {name}" for name in entries]
    tokens = sorted(path.name for path in (samples.folder / "tokens").glob("*") if not path.name.startswith("."))
    lines.append(f"tokenised for   {', '.join(tokens) or 'no tokenizer yet'}")
    return lines


def show_list(samples: ListwiseSamples, row: int, passages: int) -> list[str]:
    """Return a list's query and its first passages, texts cut."""
    sample = samples.samples[row]
    lines = ["", f"{sample['query_id']}: {cut(sample['query'])}"]
    shown = samples.corpus[sample["passages"][:passages]]
    for doc_id, text, label, rank in zip(shown["doc_id"], shown["text"], sample["labels"], sample["ranks"]):
        lines.append(f"  label {label:<6g} rank {rank:<5} {doc_id}  {cut(text)}")
    if len(sample["passages"]) > passages:
        lines.append(f"  and {len(sample['passages']) - passages:,} more")
    return lines


def cut(text: str) -> str:
    """Return a text in one line, cut to the width of a terminal."""
    text = " ".join(text.split())
    return text if len(text) <= TEXT_WIDTH else f"{text[: TEXT_WIDTH - 3]}..."


def plot(samples: ListwiseSamples, path: Path) -> None:
    """Draw list lengths, labels, and ranks of all and of relevant passages."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install 'setenc_hf[plot]'") from error
    lengths, labels, ranks = distributions(samples)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].hist(lengths, bins=_bins(lengths), color="#4477aa")
    axes[0].set(title="List lengths", xlabel="passages of a list", ylabel="lists")
    axes[1].hist(labels, bins=_bins(labels), color="#4477aa")
    axes[1].set(title=f"Labels ({samples.labels_kind})", xlabel="label", ylabel="passages")
    retrieved = ranks > 0
    if retrieved.any():
        bins = _bins(ranks[retrieved])
        axes[2].hist(ranks[retrieved], bins=bins, color="#bbccdd", label="all")
        if samples.labels_kind == "relevance":
            axes[2].hist(ranks[retrieved & (labels > 0)], bins=bins, color="#aa3377", label="relevant")
            figure.legend(*axes[2].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    axes[2].set(title="Ranks in the run", xlabel="rank", ylabel="passages")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise InputError(f"--plot {path}: {' '.join(str(error).split())[:200]}") from None


def _bins(values: np.ndarray) -> np.ndarray:
    """Return edges of at most 40 bins; whole numbers stand in the middle of theirs."""
    low, high = float(values.min()), float(values.max())
    if (values == np.round(values)).all():
        width = max(int(np.ceil((high - low + 1) / 40)), 1)
        return np.arange(low - 0.5, high + width + 0.5, width)
    return np.linspace(low, high, 41)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.describe", description=__doc__)
    parser.add_argument("samples", type=Path, help="folder that data_prep.build_samples made")
    parser.add_argument("--lists", type=int, default=2, help="lists to show (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=5, help="passages to show of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of lists (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="picture to draw (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    if args.lists < 0 or args.passages < 1:
        raise InputError("--lists must be 0 or more and --passages at least 1")
    samples = ListwiseSamples.open(args.samples)
    rows = np.random.default_rng(args.seed).permutation(len(samples))[: args.lists]
    for line in [*summary(samples), *(line for row in rows for line in show_list(samples, int(row), args.passages))]:
        print(line)
    if args.plot:
        plot(samples, args.plot)
        print(f"drew {args.plot}")


if __name__ == "__main__":
    run_command(main)

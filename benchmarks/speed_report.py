"""What `speed.py` found, as tables and as a picture."""

from pathlib import Path
from typing import Any

from .report import Spread, processor, ratios, table

LIGHTNING, SENTENCES = "lightning-ir float32", "sentence-transformers float32"


def render(results: dict[str, Any]) -> str:
    """Return all tables for which there are figures."""
    parts = []
    if "rerank" in results:
        parts.append(render_rerank(results["rerank"]))
    if "quality" in results:
        parts.append(render_quality(results["quality"]))
    if "train" in results:
        parts.append(render_train(results["train"]))
    if "cost" in results:
        parts.append(render_cost(results["cost"]))
    return "\n\n".join(parts)


def render_rerank(found: dict[str, Any]) -> str:
    lists, peaks = found["lists"], found["peaks"]
    seconds = {name: [row["seconds"][name] for row in lists] for name in lists[0]["seconds"]}
    rows = []
    for name, times in seconds.items():
        dtype = name.split()[-1]
        shares = Spread.of(row["flops"] / taken / peaks[dtype] for row, taken in zip(lists, times))
        rates = Spread.of(row["passages"] / taken for row, taken in zip(lists, times))
        cells = [name, Spread.of(times).show("{:.3f}"), rates.show("{:.0f}"), f"{found['memory'][name] / 2**30:.2f}"]
        cells += [shares.show("{:.0%}") if name.startswith("setenc_hf") else ""]
        for peer in (LIGHTNING, SENTENCES):
            cells.append("" if name == peer else ratios(seconds[peer], times).show())
        difference = max(row["difference"][name] for row in lists)
        # a pointwise model is another one: its scores have nothing to be equal to
        cells.append("" if name in (LIGHTNING, SENTENCES) else f"{difference:.1e}")
        rows.append(cells)
    header = ["system", "seconds a list", "passages a second", "peak memory, GiB", "share of the matrix peak"]
    header += ["times as fast as lightning-ir", "as sentence-transformers", "largest difference of a score"]
    about = next(iter(found["about"].values()))
    tokens, work = Spread.of(row["tokens"] for row in lists), Spread.of(row["flops"] / 1e12 for row in lists)
    return (
        f"### Re-ranking\n\n{len(lists)} lists of {lists[0]['passages']} passages, {tokens.show('{:,.0f}')} tokens and "
        f"{work.show('{:.3f}')} TFLOP in linear layers a list; {processor()}, torch {about['torch']}, "
        f"{about['threads']} threads. The peak of a matrix product in the same run was {peaks['float32'] / 1e9:.0f} "
        f"GFLOP/s in float32 and {peaks['bfloat16'] / 1e9:.0f} in bfloat16. `--dtype auto` is {found['auto']} here. "
        f"Scores of a list span {Spread.of(row['score_range'] for row in lists).show()}.\n\n" + table(header, rows)
    )


def render_quality(found: dict[str, Any]) -> str:
    values = found["nDCG@10"]
    rows = [[dtype, f"{value:.4f}", f"{value - values['float32']:+.4f}"] for dtype, value in values.items()]
    return "### Effect of the type on the ranking\n\n" + table(
        ["type", f"nDCG@10 over {found['run']}", "difference"], rows
    )


def render_train(found: dict[str, Any]) -> str:
    rows = []
    for shape in found["shapes"]:
        ours, theirs = (shape["seconds"][name] for name in ("setenc_hf", "lightning-ir"))
        memory = [shape["memory"][name] for name in ("setenc_hf", "lightning-ir")]
        whole = [part["peak"] for part in memory]
        above = [part["peak"] - part["loaded"] for part in memory]
        losses = list(shape["losses"].values())
        row = [f"{shape['lists']} x {shape['size']}", shape["dtype"]]
        row += [Spread.of(ours).show("{:.3f}"), Spread.of(theirs).show("{:.3f}"), ratios(theirs, ours).show()]
        for mine, other in (whole, above):
            row.append(f"{mine / 2**30:.2f} / {other / 2**30:.2f} = {mine / other:.2f}")
        row.append(f"{abs(losses[0] - losses[1]):.1e}")
        rows.append(row)
    header = ["lists x passages", "type", "setenc_hf, seconds", "lightning-ir, seconds", "times as fast"]
    header += ["peak memory, GiB", "of it above the loaded model", "difference of the first loss"]
    return (
        "### A training step\n\nTokenising, forward, backward and AdamW, RankNet, dropout .1 on hidden states and none "
        "on attention weights; weights in float32, bfloat16 by autocast. Memory is setenc_hf / lightning-ir, each in "
        "a fresh process; losses are compared in float32 without dropout.\n\n" + table(header, rows)
    )


def render_cost(found: dict[str, Any]) -> str:
    parts = []
    for key, what in (("sizes", "passages"), ("lengths", "length")):
        points = found[key]
        names = list(points[0]["seconds"])
        rows = []
        for point in points:
            cells = [f"{point[what]:,}", f"{point['tokens']:,}"]
            for name in names:
                times = point["seconds"].get(name)
                per = 1000 / point["passages"]
                cells.append(Spread.of(time * per for time in times).show("{:.1f}") if times else "not run")
            rows.append(cells)
        label = {"passages": "passages", "length": "tokens of a passage"}[what]
        parts.append(table([label, "tokens of the list", *(f"{name}, ms a passage" for name in names)], rows))
    lines = ["### Cost against the number of passages and their length", *parts]
    by_size = {point["passages"]: point for point in found["sizes"]}
    if 100 in by_size and 1000 in by_size:
        for name in (name for name in by_size[1000]["seconds"] if name.startswith("setenc_hf")):
            medians = [Spread.of(by_size[size]["seconds"][name]).median / size for size in (1000, 100)]
            lines.append(
                f"A passage in a list of 1,000 against one in a list of 100, {name}: x {medians[0] / medians[1]:.2f}"
            )
    return "\n\n".join(lines)


def draw_cost(found: dict[str, Any], path: Path) -> None:
    """Draw both costs, one beside the other; the band is from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    colours = {
        "setenc_hf float32": "#1f5fa8",
        "setenc_hf bfloat16": "#5ba4e6",
        LIGHTNING: "#d1495b",
        SENTENCES: "#8a8a8a",
    }
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), constrained_layout=True)
    panels = (
        ("sizes", "passages", "passages in the list"),
        ("lengths", "length", "tokens of a passage (100 passages)"),
    )
    for axis, (key, what, label) in zip(axes, panels):
        for name in found[key][0]["seconds"]:
            points = [point for point in found[key] if name in point["seconds"]]
            spreads = [Spread.of(point["seconds"][name]) for point in points]
            places = [point[what] for point in points]
            colour = colours.get(name, "#444444")
            axis.plot(places, [s.median for s in spreads], marker="o", markersize=4, color=colour, label=name)
            axis.fill_between(places, [s.low for s in spreads], [s.high for s in spreads], color=colour, alpha=0.15)
        axis.set_xlabel(label)
        axis.set_ylabel("seconds a list")
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks([point[what] for point in found[key]], [f"{point[what]:,}" for point in found[key]])
        axis.minorticks_off()
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    axes[0].set_xticks([p["passages"] for p in found["sizes"]], [f"{p['passages']:,}" for p in found["sizes"]])
    axes[0].minorticks_off()
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        "One re-ranked list, from text to scores (sentence-transformers: each passage on its own)", fontsize=11
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)

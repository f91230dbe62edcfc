"""Seconds, memory and scores of this project beside its peers, on the same real lists, in one run.

    python -m benchmarks.speed [rerank] [train] [cost] [quality] [--quick] [--markdown benchmarks/README.md]

Every system runs in its own environment (`benchmarks.environments`) and in a process of its own; they are asked in
turn, one list at a time, so that one computes while the others wait. Ratios are of neighbours in that order.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from setenc_hf.collection import open_collection
from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_file
from setenc_hf.trec import read_lists

from .environments import ENVIRONMENTS, environment
from .flops import MATRIX_SIZES, backbone_config, count_tokens, cut_texts, linear_flops
from .folders import (
    PASSAGE_LENGTH,
    QUERY_LENGTH,
    backbone,
    save_lightning_ir,
    save_pointwise,
    save_set_encoder,
)
from .report import write_report
from .speed_report import draw_cost, render
from .worker import Worker

DATA = Path(__file__).parents[2] / "shared" / "data" / "trec-dl" / "dl19"
OURS, LIGHTNING, SENTENCES = "setenc_hf", "lightning-ir", "sentence-transformers"
TextList = tuple[str, list[str]]  # a query and its passages


class Bench:
    """What all measurements need: the lists, the models and the environments."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.lists = self.read_texts()
        self.pythons = {OURS: Path(sys.executable)}
        for name in (LIGHTNING, SENTENCES):
            self.pythons[name] = environment(name, args.environments)
        self.model = args.model or backbone()
        self.started = time.monotonic()

    def is_late(self) -> bool:
        """Return whether the present measurement has to make do with what it has."""
        return time.monotonic() - self.started > 60 * self.args.minutes

    def read_texts(self) -> list[TextList]:
        """Return the first lists of the run that have texts for `--depth` passages."""
        collection = open_collection(str(self.args.data))
        queries = collection.queries()
        ranked = list(read_lists(self.args.run or self.args.data / "runs" / "bm25.run", self.args.depth))
        texts = collection.texts({line.doc_id for item in ranked for line in item.lines})
        lists = [
            (queries[item.query_id], [texts[line.doc_id] for line in item.lines if line.doc_id in texts])
            for item in ranked
            if item.query_id in queries
        ]
        whole = [item for item in lists if len(item[1]) == self.args.depth][: self.args.lists]
        if not whole:
            raise InputError(f"no query of the run has {self.args.depth} passages with texts in {self.args.data}")
        return whole

    def folders(self, name: str, depth: int = 100, **fields: Any) -> dict[str, Path]:
        """Save one set of weights in every system's format, under a name; return the folders."""
        target = self.work / name
        ours = save_set_encoder(self.model, target / "ours", **fields)
        folders = {OURS: ours, SENTENCES: save_pointwise(ours, target / "pointwise")}
        config = json.loads((ours / "config.json").read_text("utf-8"))
        if config.get("normalize_interaction"):
            raise InputError(f"{self.model}: lightning-ir has no `normalize_interaction`; compare without --model")
        return {**folders, LIGHTNING: save_lightning_ir(ours, target / "lightning-ir", depth)}

    def worker(self, system: str, folder: Path, dtype: str, training: bool = False) -> Worker:
        """Start a worker; it has loaded its model when this returns."""
        arguments = [system, "--folder", str(folder), "--dtype", dtype, "--threads", str(self.args.threads)]
        return Worker(self.pythons[system], arguments + ["--training"] * training)

    def fleet(self, folders: dict[str, Path], wanted: Sequence[tuple[str, str]]) -> dict[str, Worker]:
        """Start workers of (system, dtype), named like `setenc_hf float32`; `auto` is dropped where it is another's."""
        fleet: dict[str, Worker] = {}
        for system, dtype in wanted:
            worker = self.worker(system, folders[system], dtype)
            name = f"{system} {worker.about['dtype']}"
            if name in fleet:
                worker.close()
            else:
                fleet[name] = worker
            if dtype == "auto":
                self.auto = worker.about["dtype"]
        return fleet


def measure_rerank(bench: Bench) -> dict[str, Any]:
    """Re-rank lists with every system in turn; the peak of the machine is measured before, between and behind."""
    folders = bench.folders("rerank")
    wanted = [(OURS, "float32"), (LIGHTNING, "float32"), (OURS, "bfloat16"), (SENTENCES, "float32"), (OURS, "auto")]
    fleet = bench.fleet(folders, wanted)
    config = backbone_config(folders[OURS])
    rows: list[dict[str, Any]] = []
    peaks: dict[str, float] = {"float32": 0.0, "bfloat16": 0.0}

    def machine() -> None:
        for dtype in peaks:
            found = fleet[f"{OURS} float32"].ask("matrix_peak", dtype=dtype, sizes=bench.args.matrix_sizes)
            peaks[dtype] = max(peaks[dtype], found["flops"])

    for worker in fleet.values():  # the first call of a process sets things up
        worker.ask("rank", query=bench.lists[0][0], passages=bench.lists[0][1])
    for number, (query, passages) in enumerate(tqdm(bench.lists, desc="re-rank", disable=None)):
        if rows and bench.is_late():
            break
        if number % max(len(bench.lists) // 3, 1) == 0:
            machine()
        answers = {name: worker.ask("rank", query=query, passages=passages) for name, worker in fleet.items()}
        tokens = count_tokens(folders[OURS], query, passages, QUERY_LENGTH, PASSAGE_LENGTH)
        theirs = answers[f"{LIGHTNING} float32"]["scores"]
        rows.append(
            {
                "passages": len(passages),
                "tokens": tokens,
                "flops": linear_flops(config, tokens, len(passages)),
                "seconds": {name: answer["seconds"] for name, answer in answers.items()},
                "difference": {
                    name: max(abs(a - b) for a, b in zip(answer["scores"], theirs, strict=True))
                    for name, answer in answers.items()
                },
                "score_range": max(theirs) - min(theirs),
            }
        )
    machine()
    memory = {name: worker.ask("memory")["peak"] for name, worker in fleet.items()}
    about = {name: worker.about for name, worker in fleet.items()}
    for worker in fleet.values():
        worker.close()
    return {"lists": rows, "peaks": peaks, "memory": memory, "about": about, "auto": bench.auto}


def measure_train(bench: Bench) -> dict[str, Any]:
    """Take training steps in turn; a new process for every shape and type, so that its peak memory is that step's."""
    folders = bench.folders("train", attention_dropout=0.0)
    shapes = [(1, bench.args.depth), (16, 8)] if not bench.args.quick else [(1, 10), (2, 8)]
    found = []
    for dtype in bench.args.train_dtypes:
        for lists, size in shapes:
            chosen = [bench.lists[number % len(bench.lists)] for number in range(lists)]
            batch = {
                "queries": [query for query, _ in chosen],
                "passages": [passages[:size] for _, passages in chosen],
                "labels": [[float(size - place) for place in range(size)]] * lists,
            }
            fleet = {name: bench.worker(name, folders[name], dtype, training=True) for name in (OURS, LIGHTNING)}
            # of the untrained weights, without dropout, in float32; takes less memory than a step
            losses = {name: worker.ask("plain_loss", **batch)["loss"] for name, worker in fleet.items()}
            steps: dict[str, list[float]] = {name: [] for name in fleet}
            for number in tqdm(range(bench.args.steps + 1), desc=f"{lists} x {size} {dtype}", disable=None):
                if number > 1 and bench.is_late():
                    break
                for name, worker in fleet.items():
                    answer = worker.ask("train_step", **batch)
                    if number:  # the first makes the optimizer's state
                        steps[name].append(answer["seconds"])
            memory = {
                name: {**worker.ask("memory"), "loaded": worker.about["memory"]} for name, worker in fleet.items()
            }
            for worker in fleet.values():
                worker.close()
            found.append(
                {
                    "lists": lists,
                    "size": size,
                    "dtype": dtype,
                    "seconds": steps,
                    "memory": memory,
                    "losses": losses,
                }
            )
    return {"shapes": found}


def measure_cost(bench: Bench) -> dict[str, Any]:
    """Re-rank lists of more and more passages, then passages of more and more tokens, several times in turn."""
    sizes = [10, 30] if bench.args.quick else bench.args.sizes
    lengths = [32, 64] if bench.args.quick else bench.args.lengths
    repeats = 2 if bench.args.quick else bench.args.repeats
    query, top = bench.lists[0]
    pool = list(dict.fromkeys([text for _, passages in bench.lists for text in passages]))
    others = [text for text in pool if text not in set(top)]
    while len(top) + len(others) < max(sizes):
        more = open_collection(str(bench.args.data)).docs()
        others += [doc.text for doc in more if doc.text not in set(pool)][: max(sizes)]
    ranked = [*top, *others]
    result: dict[str, Any] = {"sizes": [], "lengths": []}
    folders = bench.folders("sizes", depth=max(sizes))
    wanted = [(OURS, "float32"), (OURS, "bfloat16"), (SENTENCES, "float32"), (LIGHTNING, "float32")]
    fleet = bench.fleet(folders, wanted)
    for size in tqdm(sizes, desc="passages", disable=None):
        # passages are drawn evenly over the list, so that lists of all sizes have the same lengths
        passages = ranked[: max(sizes)][:: max(sizes) // size][:size]
        seconds = time_in_turn(fleet, query, passages, repeats, bench.args.largest_lightning_ir)
        tokens = count_tokens(folders[OURS], query, passages, QUERY_LENGTH, PASSAGE_LENGTH)
        result["sizes"].append({"passages": size, "tokens": tokens, "seconds": seconds})
    result["memory"] = {name: worker.ask("memory")["peak"] for name, worker in fleet.items()}
    long = [" ".join(ranked[number : number + 12]) for number in range(min(len(top), 100))]  # over 256 tokens each
    for length in tqdm(lengths, desc="tokens", disable=None):
        passages = cut_texts(folders[OURS], long, length)
        seconds = time_in_turn(fleet, query, passages, repeats, bench.args.largest_lightning_ir)
        tokens = count_tokens(folders[OURS], query, passages, QUERY_LENGTH, PASSAGE_LENGTH)
        result["lengths"].append({"length": length, "passages": len(passages), "tokens": tokens, "seconds": seconds})
    for worker in fleet.values():
        worker.close()
    return result


def time_in_turn(
    fleet: dict[str, Worker], query: str, passages: Sequence[str], repeats: int, largest_lightning_ir: int
) -> dict[str, list[float]]:
    """Return the seconds of one list in every system, `repeats` times behind an untimed one."""
    seconds: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        for name, worker in fleet.items():
            if name.startswith(LIGHTNING) and len(passages) > largest_lightning_ir:
                continue
            answer = worker.ask("rank", query=query, passages=passages)
            if number:
                seconds.setdefault(name, []).append(answer["seconds"])
    return seconds


def measure_quality(bench: Bench) -> dict[str, Any]:
    """Re-rank the whole run in each mode with `setenc_hf.rerank`, and measure nDCG@10 over all judgements."""
    from setenc_hf import rerank
    from setenc_hf.measures import mean, parse_measures, per_query, run_scores
    from setenc_hf.trec import read_qrels

    if bench.args.model is None:
        raise InputError("quality is that of a trained model: name one with --model")
    run = bench.args.run or bench.args.data / "runs" / "bm25.run"
    if bench.args.quick:
        short = bench.work / "short.run"
        short.write_text("".join(Path(run).read_text("utf-8").splitlines(keepends=True)[:200]), "utf-8")
        run = short
    qrels = list(read_qrels(bench.args.data / "qrels.txt"))
    found = {}
    for dtype in ("float32", "bfloat16"):
        output = bench.work / f"{dtype}.run"
        rerank.main(
            f"--model {bench.args.model} --run {run} --collection {bench.args.data} --output {output} "
            f"--depth {bench.args.depth} --dtype {dtype}".split()
        )
        values = per_query(parse_measures(["nDCG@10"]), qrels, run_scores(read_lists(output)))
        found[dtype] = mean(values["nDCG@10"])
    return {"nDCG@10": found, "run": Path(run).name}


MEASUREMENTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "rerank": measure_rerank,
    "train": measure_train,
    "cost": measure_cost,
    "quality": measure_quality,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help=f"of {', '.join(MEASUREMENTS)} (default: all that --model allows)")
    add("--data", type=Path, default=DATA, metavar="DIR", help="collection with runs/ and qrels.txt (%(default)s)")
    add("--run", type=Path, help="first-stage run (default: runs/bm25.run of --data)")
    add("--model", help="Set-Encoder or backbone to time (default: all-MiniLM-L6-v2 with a random head)")
    add("--depth", type=int, default=100, help="passages of a list (default: %(default)s)")
    add("--lists", type=int, default=20, help="lists that are re-ranked (default: %(default)s)")
    add("--steps", type=int, default=5, help="training steps of each system (default: %(default)s)")
    add("--train-dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--sizes", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="passages (default: %(default)s)")
    add("--lengths", type=int, nargs="+", default=[32, 64, 128, 192, 256], help="tokens (default: %(default)s)")
    add("--repeats", type=int, default=3, help="timings of each point of the cost (default: %(default)s)")
    add("--largest-lightning-ir", type=int, default=300, help="passages it is asked for at most (%(default)s)")
    add("--minutes", type=float, default=60, help="stop rerank and train after these, with fewer lists and steps")
    add("--threads", type=int, default=0, help="of each system (default: as torch chooses)")
    add("--environments", type=Path, default=ENVIRONMENTS, metavar="DIR", help="peers (default: %(default)s)")
    add("--results", type=Path, help="JSON file that keeps the figures of what is not measured now")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, between its marks if it has them")
    add("--plot", type=Path, metavar="FILE", help="picture of the cost")
    add("--quick", action="store_true", help="two lists and small sizes: to see that it runs, not for figures")
    args = parser.parse_args(argv)
    unknown = [what for what in args.what if what not in MEASUREMENTS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is nothing to measure; choose of {', '.join(MEASUREMENTS)}")
    args.what = args.what or [what for what in MEASUREMENTS if what != "quality" or args.model]
    if args.depth < 2 or args.lists < 1 or args.steps < 1 or args.repeats < 1:
        raise InputError("--depth is at least 2; --lists, --steps and --repeats are at least 1")
    if args.quick:
        args.lists, args.steps = 2, 1
    args.matrix_sizes = [256] if args.quick else list(MATRIX_SIZES)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    results = json.loads(args.results.read_text("utf-8")) if args.results and args.results.exists() else {}
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        for what in args.what:
            bench.started = time.monotonic()
            results[what] = MEASUREMENTS[what](bench)
            if args.results:
                with atomic_file(args.results) as file:
                    file.write(json.dumps(results, indent=1) + "\n")
    text = render(results)
    print(text)
    if args.markdown:
        write_report(args.markdown, text, "speed.py")
    if args.plot and "cost" in results:
        draw_cost(results["cost"], args.plot)


if __name__ == "__main__":
    run_command(main)

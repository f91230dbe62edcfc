"""Train re-rankers on the same lists, re-rank TREC Deep Learning 2019 with each, and compare them.

    python -m benchmarks.effectiveness --data DATA --output O [--seeds 1 2 3] [--systems set-encoder pointwise ...]

DATA holds `msmarco-dev`, `trec-dl/dl19`, `trec-dl/dl21` and `trec-dl/dl22` (queries, corpus, qrels, runs). What is
finished under `O` is not done again, so that an interrupted benchmark goes on and systems can be added one by one.
`--markdown FILE` writes the tables there, between its marks. Settings are those of `recipes/minilm-*.json`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.measures import compare, mean, parse_measures, per_query, run_scores
from setenc_hf.trec import read_lists, read_qrels

from .environments import PEERS
from .folders import backbone
from .report import table, write_report

ROOT = Path(__file__).parents[1]
OURS = {"set-encoder": "int", "pointwise": "none"}  # what `interaction` makes of the same code
SYSTEMS = (*OURS, *PEERS)
FIRST_STAGES = ("bm25", "splade-pp", "webis-colbert")
DEPTHS = (10, 20, 50, 100, 200)  # passages re-ranked of the judged pools, by BM25's order
POOL = "judged-pool-bm25"
MEASURES = ("nDCG@10", "MRR@10")
# What is prepared under the output folder {o} from the data {d} and the backbone {b}: a path, and the command that
# makes it, or makes it last. What a strong system leaves out tells as much as what it lists: the teacher's order goes
# on with SPLADE++'s passages and then BM25's, so that it is an order of passages as a first stage finds them.
PREPARED = {
    "runs/retrieved.run": "benchmarks.backbone_teacher --model {b} --collection {d}/msmarco-dev "
    "--qrels {d}/msmarco-dev/qrels.train.txt --exclude {d}/msmarco-dev/qrels.dev.txt "
    "--run {d}/msmarco-dev/runs/bm25-top20.train.run {d}/msmarco-dev/runs/bing-top10.train.run --output {o}/runs",
    "runs/teacher.run": "data_prep.merge_runs --method concatenate --runs "
    "{d}/trec-dl/dl22/teacher-runs/fused-trec-systems.run {d}/trec-dl/dl22/runs/splade-pp.run "
    "{d}/trec-dl/dl22/runs/bm25.run --output {o}/runs/teacher.run",
    "samples/mined": "data_prep.build_samples --run {o}/runs/mined.run --collection {d}/msmarco-dev --labels score "
    "--output {o}/samples/mined",
    "samples/retrieved": "data_prep.build_samples --run {o}/runs/retrieved.run --collection {d}/msmarco-dev "
    "--labels score --output {o}/samples/retrieved",
    "samples/teacher": "data_prep.build_samples --run {o}/runs/teacher.run --collection {d}/trec-dl/dl22 --labels rank "
    "--depth 250 --output {o}/samples/teacher",
    "samples/dev": "data_prep.build_samples --run {d}/msmarco-dev/runs/bm25-top20.dev.run --collection {d}/msmarco-dev "
    "--qrels {d}/msmarco-dev/qrels.dev.txt --labels relevance --output {o}/samples/dev",
    "samples/dl21": "data_prep.build_samples --run {d}/trec-dl/dl21/runs/bm25.run --collection {d}/trec-dl/dl21 "
    "--labels relevance --no-add-relevant --output {o}/samples/dl21",
}
TRAINED_ON = {1: ("mined", "retrieved"), 2: ("teacher",)}  # by stage
DEVELOPED_ON = ("dev", "dl21")


def run(*words: object) -> None:
    """Run one of the project's commands, its words shown; raises `InputError` where it fails."""
    command = [sys.executable, "-m", *map(str, words)]
    print("+", *command[1:], flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        raise InputError(f"{words[0]} failed; its own words stand above")


class Bench:
    """Where the data and the results of a benchmark lie, and what makes them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.data: Path = args.data.resolve()
        self.output: Path = args.output.resolve()
        self.dl19 = self.data / "trec-dl" / "dl19"
        self.overrides: list[str] = args.train
        self.environments = ["--environments", args.environments] if args.environments else []

    def prepare(self) -> None:
        """Make the teachers' runs and the samples that are not there yet."""
        for name, words in PREPARED.items():
            if not (self.output / name).exists():
                run(*(word.format(d=self.data, o=self.output, b=backbone()) for word in words.split()))

    def model(self, system: str, seed: int, stage: int) -> Path:
        return self.output / f"{system}-{seed}" / f"stage{stage}"

    def train(self, system: str, seed: int) -> None:
        """Train both stages: the same lists in the same steps for every system."""
        for stage in (1, 2):
            folder = self.model(system, seed, stage)
            if (folder / "results.json").exists():
                continue
            start = backbone() if stage == 1 else self.model(system, seed, 1)
            words: list[object] = [f"recipes/minilm-stage{stage}.json", "--model", start, "--output_dir", folder]
            words += ["--train_samples", *(self.output / "samples" / name for name in TRAINED_ON[stage])]
            words += ["--eval_samples", *(self.output / "samples" / name for name in DEVELOPED_ON)]
            words += ["--seed", seed, "--report_to", "none"]
            words += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
            words += ["--metric_for_best_model", "dl21_nDCG@10"]  # of the samples' names here
            if system == "pointwise" and stage == 1:
                words += ["--interaction", OURS[system]]
            if system in OURS:
                run("setenc_hf.train", *words, "--overwrite_output", "true", *self.overrides)
            else:
                run("benchmarks.peers", "train", system, *words, *self.overrides, *self.environments)

    def reranked(self, system: str, seed: int, stage: int, first: str, depth: int = 100) -> Path:
        return self.output / f"{system}-{seed}" / f"stage{stage}-{first}-{depth}.run"

    def rerank(self, system: str, seed: int, stage: int, first: str, depth: int = 100) -> None:
        output = self.reranked(system, seed, stage, first, depth)
        if output.exists():
            return
        words = ["--model", self.model(system, seed, stage), "--run", self.dl19 / "runs" / f"{first}.run"]
        words += ["--collection", self.dl19, "--output", output, "--depth", depth]
        if system in OURS:
            run("setenc_hf.rerank", *words)
        else:
            run("benchmarks.peers", "rerank", system, *words, *self.environments)

    def values(self, path: Path) -> dict[str, dict[str, float]]:
        """Return measure -> query_id -> value of a run over 2019's queries."""
        qrels = list(read_qrels(self.dl19 / "qrels.txt"))
        return per_query(parse_measures(MEASURES), qrels, run_scores(read_lists(path)))

    def finished(self, stage: int, first: str, depth: int = 100) -> Iterator[tuple[str, list[int]]]:
        """Yield each system with the seeds that have re-ranked this run."""
        for system in SYSTEMS:
            folders = sorted(self.output.glob(f"{system}-[0-9]*"))
            seeds = [int(folder.name.rsplit("-", 1)[1]) for folder in folders]
            done = [seed for seed in seeds if self.reranked(system, seed, stage, first, depth).exists()]
            if done:
                yield system, done

    def main_table(self) -> str:
        """Return each system's means over seeds, their spread, and the difference to the first stage."""
        rows = []
        for first in FIRST_STAGES:
            baseline = self.values(self.dl19 / "runs" / f"{first}.run")
            rows.append([first, "as it is", *(f"{mean(baseline[name]):.4f}" for name in MEASURES), "", "", ""])
            for stage in (1, 2):
                for system, seeds in self.finished(stage, first):
                    runs = [self.values(self.reranked(system, seed, stage, first)) for seed in seeds]
                    over = [mean(values["nDCG@10"]) for values in runs]
                    averaged = {
                        q: statistics.mean(values["nDCG@10"][q] for values in runs) for q in baseline["nDCG@10"]
                    }
                    against = compare(averaged, baseline["nDCG@10"])
                    rows.append([
                        first,
                        f"{system}, stage {stage}",
                        *(f"{statistics.mean(mean(values[name]) for values in runs):.4f}" for name in MEASURES),
                        f"{max(over) - min(over):.4f} of {len(seeds)}" if len(seeds) > 1 else "one seed",
                        f"{against.difference:+.3f} [{against.low:+.3f}, {against.high:+.3f}]",
                        f"{statistics.mean(self.seconds(system, seed, stage) for seed in seeds):.0f}",
                    ])  # fmt: skip
        header = ["first stage", "re-ranked by", *MEASURES, "max - min over seeds", "nDCG@10, difference", "training s"]
        return table(header, rows)

    def depth_table(self) -> str:
        """Return nDCG@10 against the number of passages re-ranked, of BM25's order of the judged passages."""
        as_it_is = f"{mean(self.values(self.dl19 / 'runs' / f'{POOL}.run')['nDCG@10']):.4f}"
        rows = [["BM25's order", *[as_it_is] * len(DEPTHS)]]
        for stage in (1, 2):
            for system, seeds in self.finished(stage, POOL, DEPTHS[0]):
                cells = []
                for depth in DEPTHS:
                    paths = [self.reranked(system, seed, stage, POOL, depth) for seed in seeds]
                    done = [mean(self.values(path)["nDCG@10"]) for path in paths if path.exists()]
                    cells.append(f"{statistics.mean(done):.4f}" if done else "")
                rows.append([f"{system}, stage {stage}", *cells])
        return table(["nDCG@10 at passages re-ranked", *map(str, DEPTHS)], rows)

    def seconds(self, system: str, seed: int, stage: int) -> float:
        results = json.loads((self.model(system, seed, stage) / "results.json").read_text("utf-8"))
        return float(results["train_seconds"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.effectiveness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with msmarco-dev and trec-dl")
    add("--output", type=Path, required=True, help="folder of samples, models and runs")
    add("--systems", nargs="*", choices=SYSTEMS, default=list(OURS), help="what to train (default: our two)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    add("--first-stages", nargs="*", choices=FIRST_STAGES, default=["bm25"], help="runs to re-rank (default: bm25)")
    add("--depths", action="store_true", help="also re-rank the judged pools at 10 to 200 passages (our systems)")
    add("--train", default="", type=str.split, metavar="'ARGUMENTS'", help="what overrides both recipes, as one word")
    add("--environments", type=Path, help="where the peers' environments are built")
    add("--markdown", type=Path, help="write the tables there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    bench = Bench(args)
    if not (bench.dl19 / "qrels.txt").exists():
        raise InputError(f"{bench.dl19}: no qrels.txt there; --data names a folder with msmarco-dev and trec-dl/dl19")
    bench.prepare()
    for seed in args.seeds:
        for system in args.systems:
            bench.train(system, seed)
            for stage in (1, 2):
                for first in args.first_stages:
                    bench.rerank(system, seed, stage, first)
                for depth in DEPTHS if args.depths and system in OURS else ():
                    bench.rerank(system, seed, stage, POOL, depth)
    text = f"{bench.main_table()}\n\n{bench.depth_table()}"
    print(text)
    if args.markdown:
        write_report(args.markdown, text, "effectiveness.py")


if __name__ == "__main__":
    run_command(main)

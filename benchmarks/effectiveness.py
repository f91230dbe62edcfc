"""Train re-rankers on the same lists, re-rank TREC Deep Learning 2019 with each, and compare them.

    python -m benchmarks.effectiveness --data DATA --output O [--seeds 1 2 3] [--systems set-encoder pointwise ...]

DATA holds `msmarco-dev`, `trec-dl/dl19`, `trec-dl/dl21` and `trec-dl/dl22` (queries, corpus, qrels, runs). What is
finished under `O` is not done again, so that an interrupted benchmark goes on and systems can be added one by one.
`--results FILE` keeps what was measured, query by query, and goes on with it: seeds and systems may come from several
machines. `--markdown FILE` writes the tables there, between its marks, and `--plot FILE` draws the means. Settings are
those of `recipes/minilm-*.json`.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.measures import parse_measures, per_query, run_scores
from setenc_hf.trec import Qrel, read_lists, read_qrels

from .effectiveness_report import BI_ENCODER, MEASURES, STATES, Results, Values, draw, render
from .environments import PEERS
from .folders import backbone
from .report import write_report

ROOT = Path(__file__).parents[1]
OURS = {"set-encoder": "int", "pointwise": "none"}  # what `interaction` makes of the same code
SYSTEMS = (*OURS, *PEERS)
FIRST_STAGES = ("bm25", "splade-pp", "webis-colbert")
DEPTHS = (10, 20, 50, 100, 200)  # passages re-ranked of the judged pools, by BM25's order
POOL = "judged-pool-bm25"
DEPTH = 100
RECIPES = {stage: ROOT / "recipes" / f"minilm-stage{stage}.json" for stage in (1, 2)}
TAUGHT = (
    "data_prep.merge_runs --method linear --weights 1 0.05 --first-only --runs {{o}}/runs/{name}.run "
    "{{o}}/runs/bm25.run --output {{o}}/runs/{name}-taught.run"
)
LABELLED = (
    "data_prep.build_samples --collection {{d}}/msmarco-dev --labels score --run {{o}}/runs/{name}-taught.run "
    "--output {{o}}/samples/{name}"
)
# a bi-encoder of 110 million weights: better than the backbone, and quick to ask, as it reads each passage once
TEACHER_MODEL = "sentence-transformers/all-mpnet-base-v2"
# every training is measured once, at its end; the measure is of the samples' names here
TO_THE_END = (
    "--report_to none --eval_strategy no --save_strategy no --load_best_model_at_end false "
    "--metric_for_best_model dl21_nDCG@10"
)
# Each stage forgets some of what it starts from: on the development sets the mean of both and of the backbone is ahead
AVERAGE = "setenc_hf.average_models --models {folder}/stage1 {folder}/stage2 {b} --weights 0.4 0.4 0.2"
# What is prepared under the output folder {o} from the data {d} and the teacher {t}: a path, and the command that makes
# it, or makes it last. Stage 1 learns the bi-encoder's cosines with BM25's scores, which tell what the cosines miss,
# and stage 2 the order of strong systems; what strong systems leave out tells as much as what they list, so that the
# order goes on with SPLADE++'s passages and then BM25's.
PREPARED = {
    "runs/retrieved.run": "benchmarks.bi_encoder_teacher --model {t} --collection {d}/msmarco-dev "
    "--qrels {d}/msmarco-dev/qrels.train.txt --exclude {d}/msmarco-dev/qrels.dev.txt "
    "--run {d}/msmarco-dev/runs/bm25-top20.train.run {d}/msmarco-dev/runs/bing-top10.train.run --output {o}/runs",
    "runs/bm25.run": "data_prep.retrieve --retriever bm25 --collection {d}/msmarco-dev --index-dir {o}/bm25 "
    "--depth 1000 --output {o}/runs/bm25.run",
    "runs/mined-taught.run": TAUGHT.format(name="mined"),
    "runs/retrieved-taught.run": TAUGHT.format(name="retrieved"),
    "samples/mined": LABELLED.format(name="mined"),
    "samples/retrieved": LABELLED.format(name="retrieved"),
    "runs/teacher.run": "data_prep.merge_runs --method concatenate --runs "
    "{d}/trec-dl/dl22/teacher-runs/fused-trec-systems.run {d}/trec-dl/dl22/runs/splade-pp.run "
    "{d}/trec-dl/dl22/runs/bm25.run --output {o}/runs/teacher.run",
    "samples/dev": "data_prep.build_samples --run {d}/msmarco-dev/runs/bm25-top20.dev.run --collection {d}/msmarco-dev "
    "--qrels {d}/msmarco-dev/qrels.dev.txt --labels relevance --output {o}/samples/dev",
    "samples/dl21": "data_prep.build_samples --run {d}/trec-dl/dl21/runs/bm25.run --collection {d}/trec-dl/dl21 "
    "--labels relevance --no-add-relevant --output {o}/samples/dl21",
    "samples/teacher": "data_prep.build_samples --run {o}/runs/teacher.run --collection {d}/trec-dl/dl22 --labels rank "
    "--depth 250 --output {o}/samples/teacher",
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
        self.stages = [f"stage{stage}" for stage in range(1, args.stages + 1)]
        self.teacher: str = args.teacher
        self.environments = ["--environments", args.environments] if args.environments else []

    def prepare(self) -> None:
        """Make the teachers' runs and the samples that are not there yet."""
        for name, words in PREPARED.items():
            if not (self.output / name).exists():
                places = {"d": self.data, "o": self.output, "b": backbone(), "t": self.teacher}
                command = [word.format(**places) for word in words.split()]
                run(*command)

    def model(self, system: str, seed: int, state: str) -> Path:
        return self.output / f"{system}-{seed}" / state

    def states(self, system: str) -> list[str]:
        """Return what there is of a system: the stages, and the mean of our own."""
        return [state for state in STATES if state in self.stages or (system in OURS and "stage2" in self.stages)]

    def train(self, system: str, seed: int) -> None:
        """Train the stages: the same lists in the same steps for every system. Average those of our own."""
        for stage, state in enumerate(self.stages, start=1):
            folder = self.model(system, seed, state)
            if (folder / "results.json").exists():
                continue
            start = backbone() if stage == 1 else self.model(system, seed, "stage1")
            words: list[object] = [RECIPES[stage], "--model", start, "--output_dir", folder]
            words += ["--train_samples", *(self.output / "samples" / name for name in TRAINED_ON[stage])]
            words += ["--eval_samples", *(self.output / "samples" / name for name in DEVELOPED_ON)]
            words += ["--seed", seed, *TO_THE_END.split()]
            if system == "pointwise" and stage == 1:
                words += ["--interaction", OURS[system]]
            if system in OURS:
                run("setenc_hf.train", *words, "--overwrite_output", "true", *self.overrides)
            else:
                run("benchmarks.peers", "train", system, *words, *self.overrides, *self.environments)
        mean = self.model(system, seed, "mean")
        if "mean" in self.states(system) and not mean.exists():
            words = [word.format(folder=mean.parent, b=backbone()) for word in AVERAGE.split()]
            run(*words, "--output", mean)

    def rerank(self, system: str, seed: int, state: str, first: str, depth: int = DEPTH) -> None:
        output = self.output / f"{system}-{seed}" / f"{state}-{first}-{depth}.run"
        if output.exists():
            return
        words = ["--model", self.model(system, seed, state), *self.words(first, depth, output)]
        if system in OURS:
            run("setenc_hf.rerank", *words)
        else:
            run("benchmarks.peers", "rerank", system, *words, *self.environments)

    def rerank_untrained(self, first: str) -> None:
        """Re-rank with the backbone as bi-encoder."""
        output = self.output / BI_ENCODER / f"{first}-{DEPTH}.run"
        if not output.exists():
            run("benchmarks.bi_encoder", "--model", backbone(), *self.words(first, DEPTH, output))

    def words(self, first: str, depth: int, output: Path) -> list[object]:
        runs = ["--run", self.dl19 / "runs" / f"{first}.run", "--collection", self.dl19]
        return [*runs, "--depth", depth, "--output", output]

    def measure(self, results: Results) -> None:
        """Add everything that lies in the output folder to the results."""
        for first in (*FIRST_STAGES, POOL):
            results.add_run(first, self.values(self.dl19 / "runs" / f"{first}.run"))
        for path in sorted((self.output / BI_ENCODER).glob("*.run")):
            results.add_run(f"{BI_ENCODER}/{path.stem}", self.values(path))
        for system in SYSTEMS:
            for folder in sorted(self.output.glob(f"{system}-[0-9]*")):
                for path in sorted(path for state in STATES for path in folder.glob(f"{state}-*.run")):
                    state, _, reranked = path.stem.partition("-")
                    results.add_run(f"{folder.name}/{state}/{reranked}", self.values(path))
                for path in sorted(folder.glob("stage*/results.json")):
                    seconds = json.loads(path.read_text("utf-8"))["train_seconds"]
                    results.add_training(f"{folder.name}/{path.parent.name}", seconds)

    @cached_property
    def qrels(self) -> list[Qrel]:
        return list(read_qrels(self.dl19 / "qrels.txt"))

    def values(self, path: Path) -> Values:
        """Return measure -> query_id -> value of a run over 2019's queries."""
        return per_query(parse_measures(MEASURES), self.qrels, run_scores(read_lists(path)))


def method(overrides: Sequence[str]) -> str:
    """Return what stands for the recipes, for what overrides them and for how their samples are made.

    Precision is no part of it: machines differ in what they are fast at.
    """
    told = " ".join(overrides).replace("--bf16 true", "").strip()
    text = json.dumps(PREPARED) + AVERAGE + "".join(path.read_text("utf-8") for path in RECIPES.values()) + told
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.effectiveness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with msmarco-dev and trec-dl")
    add("--output", type=Path, required=True, help="folder of samples, models and runs")
    add("--teacher", default=TEACHER_MODEL, help="bi-encoder that labels stage 1's lists (default: %(default)s)")
    add("--systems", nargs="*", choices=SYSTEMS, default=list(OURS), help="what to train (default: our two)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    add("--first-stages", nargs="*", choices=FIRST_STAGES, default=["bm25"], help="runs to re-rank (default: bm25)")
    add("--stages", type=int, choices=(1, 2), default=2, help="how many stages to train and measure (default: 2)")
    add("--depths", action="store_true", help="also re-rank the judged pools at 10 to 200 passages (our systems)")
    add(
        "--train",
        default="",
        type=str.split,
        metavar="'ARGUMENTS'",
        help="what overrides both recipes, as one word",
    )
    add("--environments", type=Path, help="where the peers' environments are built")
    add("--results", type=Path, help="JSON file of figures per query, which is gone on with")
    add("--plot", type=Path, help="draw the means over BM25's list into this file (.png, .svg, .pdf)")
    add("--markdown", type=Path, help="write the tables there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    bench = Bench(args)
    if not (bench.dl19 / "qrels.txt").exists():
        raise InputError(f"{bench.dl19}: no qrels.txt there; --data names a folder with msmarco-dev and trec-dl/dl19")
    results = Results(method(args.train), args.results)
    bench.prepare()
    for first in args.first_stages:
        bench.rerank_untrained(first)
    for seed in args.seeds:
        for system in args.systems:
            bench.train(system, seed)
            for state in bench.states(system):
                for first in args.first_stages:
                    bench.rerank(system, seed, state, first)
            for depth in DEPTHS if args.depths and system in OURS else ():
                bench.rerank(system, seed, bench.states(system)[-1], POOL, depth)
    bench.measure(results)
    results.save()
    text = render(results, FIRST_STAGES, DEPTH, POOL, DEPTHS)
    print(text)
    if args.plot:
        draw(results, args.plot, FIRST_STAGES[0], DEPTH)
    if args.markdown:
        write_report(args.markdown, text, "effectiveness.py")


if __name__ == "__main__":
    run_command(main)

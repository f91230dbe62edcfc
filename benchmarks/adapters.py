"""LoRA against full fine-tuning: TREC DL 2021's lists are learnt, DL 2019's BM25 run is re-ranked.

    python -m benchmarks.adapters --data D --output O [--model M] [--steps 60] [--arms full lora] [--only train rerank]

`D` holds `dl19` and `dl21`, each a collection with `runs/bm25.run`. What `O` holds already is not done again, so that
arms and steps may be run one by one; the table at the end has all that are there.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from demo.run import backbone
from setenc_hf.command import run_command
from setenc_hf.cpu_linear import is_bfloat16_fast
from setenc_hf.measures import mean, parse_measures, per_query, run_scores
from setenc_hf.trec import read_lists, read_qrels

ARMS = {
    "full": ["--learning_rate", "5e-5"],
    "lora": ["--learning_rate", "5e-4", "--peft", "lora", "--peft_config", '{"r": 16, "lora_alpha": 32}'],
}
START = "before"  # the model that both start from
MEASURES = ("nDCG@10", "MRR@10")


def run(module: str, *words: str) -> dict[str, float]:
    """Run a command of the project; return the seconds it took, its start included: of the clock and of the CPUs."""
    print("$ python -m", module, *words, flush=True)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", module, *words], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu}


def weights(folder: Path) -> tuple[int, int]:
    """Return the number and the bytes of the weights that a folder holds: those that were trained."""
    count = size = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            count += sum(prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
        size += file.stat().st_size
    return count, size


def train(arm: str, args: argparse.Namespace, output: Path) -> dict[str, float]:
    """Train one arm; return what it took."""
    options = ["--max_steps", str(args.steps), "--warmup_steps", str(max(args.steps // 10, 1)), "--overwrite_output"]
    options += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    options += ["--report_to", "none", "--sampling", "random", "--loss_temperature", "1"]
    options += ["--bf16", str(is_bfloat16_fast(torch.device("cpu")))]
    options += ["--train_samples", str(output / "dl21"), "--output_dir", str(output / arm)]
    # the recipe names samples to evaluate on; here the measures are of the re-ranked run
    recipe = json.loads(Path("recipes/minilm-stage2.json").read_text("utf-8"))
    recipe.pop("eval_samples")
    path = output / "recipe.json"
    path.write_text(json.dumps(recipe), "utf-8")
    return run("setenc_hf.train", str(path), "--model", args.model or backbone(), *options, *ARMS[arm])


def rerank(arm: str, args: argparse.Namespace, output: Path) -> dict[str, float]:
    """Re-rank DL 2019 with one arm; return what it took."""
    dl19 = Path(args.data) / "dl19"
    return run(
        *(
            "setenc_hf.rerank",
            "--model",
            args.model if arm == START else str(output / arm),
            "--run",
            str(dl19 / "runs/bm25.run"),
        ),
        *("--collection", str(dl19), "--dtype", "float32", "--output", str(output / f"{arm}.run")),
    )


def measure(data: Path, path: Path) -> str:
    """Return a run's measures as columns."""
    qrels = list(read_qrels(data / "dl19/qrels.txt"))
    values = per_query(parse_measures(MEASURES), qrels, run_scores(read_lists(path)))
    return " | ".join(f"{mean(values[name]):.4f}".lstrip("0") for name in MEASURES)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="folder with dl19 and dl21")
    add("--output", required=True, help="folder for models and runs")
    add("--model", help="what to fine-tune: a Set-Encoder that has learnt to rank, or a backbone (all-MiniLM-L6-v2)")
    add("--steps", type=int, default=60, help="steps of 2 lists, 32 passages of each (default: %(default)s)")
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    add("--only", nargs="+", choices=["train", "rerank"], default=["train", "rerank"], help="do these steps now")
    args = parser.parse_args(argv)
    output, data = Path(args.output), Path(args.data)
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "dl21").exists():
        source = ("--run", str(data / "dl21/runs/bm25.run"), "--collection", str(data / "dl21"))
        run("data_prep.build_samples", *source, "--labels", "relevance", "--output", str(output / "dl21"))
    for arm in ([START] if args.model else []) + args.arms:
        path = output / f"{arm}.json"
        figures = json.loads(path.read_text("utf-8")) if path.exists() else {"steps": args.steps}
        for step in (rerank,) if arm == START else (train, rerank):
            if step.__name__ not in figures and step.__name__ in args.only:
                figures[step.__name__] = step(arm, args, output)
                path.write_text(json.dumps(figures), "utf-8")
    print(f"\n| | steps | {' | '.join(MEASURES)} | trained weights | saved, MB | training, CPU s | re-ranking, CPU s |")
    print("| --- " * 8 + "|")
    print(f"| BM25 | | {measure(data, data / 'dl19/runs/bm25.run')} | | | | |")
    for arm in (START, *ARMS):
        if not (output / f"{arm}.run").exists():
            continue
        figures = json.loads((output / f"{arm}.json").read_text("utf-8"))
        steps = trained = saved = training = ""
        if "train" in figures:
            count, size = weights(output / arm)
            steps, trained, saved = str(figures["steps"]), f"{count:,}", f"{size / 1e6:.1f}"
            training = f"{figures['train']['cpu_seconds']:.0f}"
        measured, seconds = measure(data, output / f"{arm}.run"), figures["rerank"]["cpu_seconds"]
        print(f"| {arm} | {steps} | {measured} | {trained} | {saved} | {training} | {seconds:.0f} |")


if __name__ == "__main__":
    run_command(main)

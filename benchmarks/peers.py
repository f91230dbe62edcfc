"""Train lightning-ir's Set-Encoder or sentence-transformers' CrossEncoder as a recipe of ours says, and re-rank.

    python -m benchmarks.peers train PEER recipes/minilm-stage1.json [--any_argument value] [--output_dir F]
    python -m benchmarks.peers rerank PEER --model F --run R --collection C --output R2

The recipe's samples are drawn here, by our own sampler: every system sees the same lists in the same steps, under the
same schedule, and learns with the loss of its own that is nearest to the recipe's. The peer runs in its environment
(`benchmarks.environments`) and reads texts and labels from a file of JSON lines.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_folder
from setenc_hf.rerank import read_inputs
from setenc_hf.trec import write_run

from .environments import ENVIRONMENTS, PEERS, environment
from .worker import ROOT

LOSSES = ("infonce", "ranknet", "kl_divergence", "margin_mse")  # those that both peers have one of their own for
SCHEDULES = ("linear", "constant", "constant_with_warmup")


class SampleTexts:
    """Stands where a sampler's token tables stand, and gives texts for the same rows."""

    def __init__(self, samples: Any) -> None:
        self.queries = samples.samples["query"]
        self.passages = samples.corpus["text"]


def draw_lists(argv: Sequence[str]) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Return what a recipe says of the training, and its lists as text, `step` by `step` as our trainer takes them."""
    from setenc_hf.lists import EpochSampler
    from setenc_hf.tokenization import SetEncoderTokenizer
    from setenc_hf.train import load_data, parse

    model_args, data_args, training = parse(argv)
    if data_args.loss not in LOSSES:
        raise InputError(f"the peers are trained with {' or '.join(LOSSES)}, not with {data_args.loss!r}")
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    if schedule not in SCHEDULES:
        raise InputError(f"the peers know the schedules {', '.join(SCHEDULES)}, not {schedule!r}")
    data_args.eval_samples = []
    lists, _ = load_data(data_args, SetEncoderTokenizer.from_pretrained(model_args.model), training)
    lists.tokens = [SampleTexts(part) for part in lists.samples]  # type: ignore[misc]
    size = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * math.ceil(len(lists) / size))
    job = {
        "model": model_args.model,
        "interaction": getattr(model_args, "interaction", None) or "int",
        "query_length": model_args.query_length or 32,
        "passage_length": model_args.passage_length or 256,
        "depth": getattr(model_args, "depth", None) or 100,
        "draws_missing": model_args.sample_missing_passages,  # None: as a peer ships
        "attention_dropout": model_args.attention_dropout,
        "loss": data_args.loss,
        "temperature": data_args.loss_temperature,
        "steps": steps,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "schedule": schedule,
        "warmup_steps": training.get_warmup_steps(steps),
        "bf16": training.bf16,
        "seed": training.seed,
        "output": training.output_dir,
    }

    def export() -> Iterator[dict[str, Any]]:
        sampler = EpochSampler(lists)
        step = epoch = 0
        while step < steps:
            lists.set_epoch(epoch)
            items = list(sampler)
            for first in range(0, len(items), size):
                if step == steps:
                    return
                for item in items[first : first + size]:
                    drawn = lists[item]
                    yield {
                        "step": step,
                        "query": drawn["query_ids"],
                        "passages": drawn["passage_ids"],
                        "labels": [float(label) for label in drawn["labels"]],
                    }
                step += 1
            epoch += 1

    return job, export()


def run_peer(python: Path, do: str, job: dict[str, Any], lists: Iterator[dict[str, Any]], work: Path) -> None:
    """Write a job and its lists, and have the peer do it; raises `InputError` where it fails."""
    path = work / "lists.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for item in lists:
            file.write(json.dumps(item) + "\n")
    (work / "job.json").write_text(json.dumps({**job, "lists": str(path)}, indent=2), "utf-8")
    command = [str(python), "-m", "benchmarks.peer_worker", do, str(work / "job.json")]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true"}
    if subprocess.run(command, env=variables).returncode:
        raise InputError(f"{job['peer']} failed to {do}; its own words stand above")


def train(peer: str, argv: Sequence[str], environments: Path) -> None:
    """Train a peer and save it under the recipe's `output_dir`, with `results.json` beside its weights."""
    job, lists = draw_lists(argv)
    output = Path(job["output"])
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: holds an earlier training; choose another --output_dir")
    python = environment(peer, environments)
    with tempfile.TemporaryDirectory() as work, atomic_folder(output) as whole:
        run_peer(python, "train", {**job, "peer": peer, "output": str(whole.resolve())}, lists, Path(work))
    results = json.loads((output / "results.json").read_text("utf-8"))
    print(f"Trained {peer} for {job['steps']} steps in {results['train_seconds']:.1f} s; saved it to {output}")


def rerank(peer: str, args: argparse.Namespace) -> None:
    """Re-rank a run with a peer's model, and write a run."""
    counts: Counter = Counter()
    inputs = read_inputs(args.run, args.collection, args.depth, counts)
    python = environment(peer, args.environments)
    with tempfile.TemporaryDirectory() as name:
        scores = Path(name) / "scores.jsonl"
        job = {"peer": peer, "model": args.model, "output": str(scores), "query_length": 32, "passage_length": 256}
        lists = ({"query": item.query, "passages": list(item.passages)} for item in inputs)
        run_peer(python, "rerank", job, lists, Path(name))
        rows = [json.loads(line) for line in scores.read_text("utf-8").splitlines()]
    scored = (
        (item.query_id, list(zip(item.doc_ids, row["scores"], strict=True)))
        for item, row in zip(inputs, rows, strict=True)
    )
    lines = write_run(args.output, scored, peer)
    for reason, count in sorted(counts.items()):
        if count:
            print(f"{count:>9,}  {reason}")
    seconds = sum(row["seconds"] for row in rows)
    print(
        f"Re-ranked {len(rows):,} lists ({lines:,} passages) with {peer} in {seconds:.1f} s: "
        f"{seconds / len(rows):.3f} s a list; wrote {args.output}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("do", choices=("train", "rerank"))
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, metavar="DIR", help="default: %(default)s")
    args, rest = parser.parse_known_args(argv)
    if args.do == "train":
        train(args.peer, rest, args.environments)
        return
    for name in ("model", "run", "collection", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--depth", type=int, default=100)
    rerank(args.peer, parser.parse_args(argv))


if __name__ == "__main__":
    run_command(main)

"""One recipe under one process, two processes, and DeepSpeed's ZeRO stages: the same losses, seconds, memory.

python -m benchmarks.parallel --model sentence-transformers/all-MiniLM-L6-v2 --samples data/msmarco --output FILE

Two lists a step in any case: two in the one process, or one in each of two. On the CPU, without dropout, in float32.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setenc_hf.command import run_command
from setenc_hf.errors import InputError

from .report import write_report

STAGES = Path(__file__).parents[1] / "recipes" / "deepspeed"
SETUPS = {  # processes, DeepSpeed's configuration
    "1 process": (1, None),
    "DDP, 2 processes": (2, None),
    **{f"ZeRO-{stage}, 1 process": (1, f"zero{stage}.json") for stage in (1, 2, 3)},
    **{f"ZeRO-{stage}, 2 processes": (2, f"zero{stage}.json") for stage in (1, 2, 3)},
}
STEPS = 50
PROCESS = """
import resource, sys
from setenc_hf.distributed import leave
from setenc_hf.train import main
main(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
leave()
"""


def train(
    model: str, samples: str, processes: int, stage: str | None, folder: Path
) -> tuple[float, float, list[float]]:
    """Return the loss of the last step, seconds a step, and the peak memory in MiB of each process."""
    recipe = {
        "model": model,
        "train_samples": [samples],
        "sample_size": 4,
        "query_length": 16,
        "passage_length": 64,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2 // processes,
        "learning_rate": 2e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "output_dir": str(folder / "model"),
    }
    if stage:
        recipe["deepspeed"] = str(STAGES / stage)
    (folder / "recipe.json").write_text(json.dumps(recipe), "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):  # as a launcher does
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 2 // processes}
        words = [sys.executable, "-c", PROCESS, str(folder / f"peak-{rank}"), str(folder / "recipe.json")]
        with open(folder / f"log-{rank}", "w") as log:
            environment = os.environ | {name: str(value) for name, value in place.items()}
            started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT))
    for process in started:
        process.wait()
    peaks = [folder / f"peak-{rank}" for rank in range(processes)]
    if not all(peak.exists() for peak in peaks):
        raise InputError(f"a process failed: {(folder / 'log-0').read_text('utf-8')[-2000:]}")
    state = json.loads((folder / "model" / "trainer_state.json").read_text("utf-8"))
    results = json.loads((folder / "model" / "results.json").read_text("utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses[-1], results["train_seconds"] / STEPS, [int(peak.read_text()) / 1024 for peak in peaks]


def main(argv: Sequence[str] | None = None) -> None:
    """Train under every set-up and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--model", required=True, help="a plain backbone: folder or hub id")
    parser.add_argument("--samples", required=True, help="listwise samples with labels of relevance")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS), help="which rows, all by default")
    parser.add_argument("--output", help="document for the table, between its marks, beside what is printed")
    args = parser.parse_args(argv)
    lines = [
        f"| set-up | loss of step {STEPS} | seconds a step | peak of each process, MiB |",
        "| --- | --- | --- | --- |",
    ]
    for name in args.setups:
        processes, stage = SETUPS[name]
        with tempfile.TemporaryDirectory() as folder:
            loss, seconds, peaks = train(args.model, args.samples, processes, stage, Path(folder))
        lines.append(f"| {name} | {loss:.6f} | {seconds:.3f} | {' + '.join(f'{peak:,.0f}' for peak in peaks)} |")
        print(lines[-1], flush=True)
    if args.output:
        write_report(Path(args.output), "\n".join(lines), "parallel.py")


if __name__ == "__main__":
    run_command(main)

"""Peak memory of one training step against the length of a list, plain, in bfloat16, and with recomputation.

python -m benchmarks.memory --model sentence-transformers/all-MiniLM-L6-v2 --output benchmarks/memory.md

A step is forward, backward and AdamW on one list of random tokens, in a process of its own. What is counted is the
process's peak above what it held before the step: model and imported code are not in it, gradients and AdamW's states
are. Without dropout, on the CPU, in float32 but for autocast.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from setenc_hf.command import run_command
from setenc_hf.errors import InputError

from .report import write_report

SIZES = (10, 50, 100, 200, 400)
TOKENS = 256
VARIANTS = {
    "plain": (),
    "bf16": ("bf16",),
    "checkpointing, a layer at a time": ("checkpointing", "whole"),
    "checkpointing, 2,048 tokens at a time": ("checkpointing",),  # what `gradient_checkpointing` is on a CPU
    "the same and bf16": ("checkpointing", "bf16"),
}


def resident() -> float:
    """Return the MiB that this process holds now."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize() / 2**20


def step(model_name: str, passages: int, options: Sequence[str]) -> tuple[float, float]:
    """Train one step on a list of `passages`; return its peak in MiB above the start, and its seconds."""
    import torch

    from setenc_hf.losses import RankNetLoss
    from setenc_hf.modeling import SetEncoderForReranking

    torch.manual_seed(0)
    model = SetEncoderForReranking.from_pretrained(model_name, hidden_dropout=0.0, attention_dropout=0.0).train()
    if "whole" in options:
        model.max_tokens_per_chunk = passages * TOKENS
    if "checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    draw = torch.Generator().manual_seed(0)
    query = torch.randint(1000, 20000, (8,), generator=draw).tolist()
    length = TOKENS - len(query) - 4  # [CLS] [INT] query [SEP] passage [SEP]
    texts = torch.randint(1000, 20000, (passages, length), generator=draw).tolist()
    batch = dict(model.tokenizer.pack([query], [texts]))
    labels = torch.arange(passages, dtype=torch.float32)[None]
    before = resident()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
        scores = model(**batch).logits
    RankNetLoss()(scores, labels).backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every length in every variant, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", required=True, help="a plain backbone: folder or hub id")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help=f"passages of a list, {TOKENS} tokens each")
    parser.add_argument("--limit", type=float, default=14, help="GiB at which a step is given up")
    parser.add_argument("--output", help="document for the table, between its marks, beside what is printed")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        size_limit = int(args.limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size_limit, size_limit))
        print(json.dumps(step(args.model, int(args.one[0]), args.one[1:])))
        return
    lines = [
        f"| passages of {TOKENS} tokens | " + " | ".join(f"{name}: MiB | s" for name in VARIANTS) + " |",
        "| --- |" + " --- | --- |" * len(VARIANTS),
    ]
    for size in args.sizes:
        cells = []
        for options in VARIANTS.values():
            words = [sys.executable, "-m", "benchmarks.memory", "--model", args.model, "--limit", str(args.limit)]
            done = subprocess.run([*words, "--one", str(size), *options], capture_output=True, text=True)
            if done.returncode and ("can't allocate memory" in done.stderr or "MemoryError" in done.stderr):
                cells.append(f"above {args.limit:g} GiB | ")
                continue
            if done.returncode:
                raise InputError(f"a step on {size} passages failed: {done.stderr[-2000:]}")
            peak, seconds = json.loads(done.stdout.splitlines()[-1])
            cells.append(f"{peak:,.0f} | {seconds:.1f}")
        lines.append(f"| {size} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.output:
        write_report(Path(args.output), "\n".join(lines), "memory.py")


if __name__ == "__main__":
    run_command(main)

"""A process that holds one system and does one thing at a time: requests and answers are lines of JSON.

    python -m benchmarks.worker SYSTEM --folder F --dtype float32 [--training] [--threads N]

It waits on its standard input, idle, so that of many workers only the one that was asked computes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAUSE = 0.2  # seconds between two requests, in which the threads of the last one go to sleep


class Worker:
    """The parent's end: starts a worker in an environment, asks it, and ends it.

    Args:
        python: of the environment.
        arguments: of `python -m benchmarks.worker`.
    """

    def __init__(self, python: str | Path, arguments: Sequence[str]) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(ROOT)}
        self.name = " ".join(arguments)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.about = self._read()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have something done and return the answer; raises `RuntimeError` with the worker's last words."""
        assert self.process.stdin is not None
        time.sleep(PAUSE)
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said at its end is read below
        return self._read()

    def close(self) -> None:
        """Let the worker end, and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"worker {self.name!r} ended:\n{self.log.read()[-3000:]}")
        return json.loads(line)


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory since it began or since `forget_peak` (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")


def memory() -> int:
    """Return the bytes that this process has in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(args: argparse.Namespace, answers: Any) -> None:
    """Open the system and answer requests until there are no more."""
    import torch

    from benchmarks.flops import matrix_peak
    from benchmarks.systems import SYSTEMS

    if args.threads:
        torch.set_num_threads(args.threads)
    system = SYSTEMS[args.system](args.folder, args.dtype, args.training)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer(dtype=system.dtype, threads=torch.get_num_threads(), torch=torch.__version__, memory=memory())
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        start = time.perf_counter()
        if do == "rank":
            found = system.rank(**request)
            seconds = time.perf_counter() - start
            answer(seconds=seconds, scores=system.scores(found))
        elif do in ("train_step", "plain_loss"):
            loss = getattr(system, do)(**request)
            answer(seconds=time.perf_counter() - start, loss=loss)
        elif do == "matrix_peak":
            answer(flops=matrix_peak(**request))
        elif do == "memory":
            answer(peak=peak_memory(), now=memory())
        else:
            raise ValueError(f"a worker does not know how to {do!r}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__.split("\n\n")[0])
    parser.add_argument("system")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    # what libraries print must not get between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(args, answers)


if __name__ == "__main__":
    main()

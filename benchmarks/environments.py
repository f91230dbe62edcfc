"""Build a virtual environment of its own for each system that the benchmarks compare with, from the package index.

    python -m benchmarks.environments [lightning-ir] [sentence-transformers] [--environments DIR]

An environment that was built from the same requirements is left as it is; one whose building was interrupted is gone
on with. `requirements-NAME.txt` beside this file holds the versions.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from setenc_hf.command import run_command
from setenc_hf.errors import InputError

HERE = Path(__file__).parent
LOCK = HERE.parent / "requirements.lock"
ENVIRONMENTS = HERE / ".environments"
PEERS = ("lightning-ir", "sentence-transformers")


def torch_requirement() -> str:
    """Return the lock's line for torch: every system computes with the same one."""
    found = re.search(r"^torch==\S+", LOCK.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise InputError(f"{LOCK}: has no line `torch==...`")
    return found[0]


def fingerprint(name: str) -> str:
    """Return what an environment depends on, as one word."""
    requirements = HERE / f"requirements-{name}.txt"
    text = requirements.read_text("utf-8") + torch_requirement() + sys.version
    if "requirements.lock" in text:
        text += LOCK.read_text("utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def environment(name: str, folder: Path = ENVIRONMENTS) -> Path:
    """Return the Python of a system's environment, which is built where it is not whole yet.

    Raises `InputError` where the package index gives no such versions.
    """
    target = folder.resolve() / name
    python, done = target / "bin" / "python", target / ".done"
    if done.exists() and done.read_text("utf-8") == fingerprint(name):
        return python
    done.unlink(missing_ok=True)
    print(f"building the environment of {name} in {target}", file=sys.stderr)
    venv.create(target, symlinks=True, with_pip=True)  # as `python -m venv`; goes over one that is there
    # torch goes first, on its own, so that nothing else chooses its build
    for wanted in ([torch_requirement()], ["--requirement", str(HERE / f"requirements-{name}.txt")]):
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        if subprocess.run(install).returncode:
            raise InputError(f"the environment of {name} cannot be built: pip failed on {' '.join(wanted)}")
    done.write_text(fingerprint(name), "utf-8")
    return python


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.environments", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)} (default: both)")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    for name in args.names or PEERS:
        if name not in PEERS:
            raise InputError(f"there is no environment {name!r}, only {', '.join(PEERS)}")
        print(f"{name}: {environment(name, args.environments)}")


if __name__ == "__main__":
    run_command(main)

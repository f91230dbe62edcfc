"""Make a collection of real text that every machine with this project has: what the libraries say of themselves.

    python -m demo.docstrings --output demo/out/collection

The summary line of a function's or class's documentation is a query, the text behind it the one relevant passage. The
source is read as text and never run. Modules are dealt out whole to training, teaching and testing, so that no query
of one part is about code of another.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_folder

PACKAGES = ("numpy", "pandas", "scipy", "torch", "transformers", "datasets", "matplotlib")
PARTS = {"train": 60, "teach": 20, "test": 20}  # per cent of the modules
SUMMARY_WORDS = range(4, 20)
BODY_WORDS = range(25, 400)
WORDS_KEPT = 40  # what the model below reads of a passage
MAX_FILE_BYTES = 400_000


class Documented(NamedTuple):
    """One documented function or class."""

    doc_id: str
    module: str
    summary: str
    body: str


def documented(package: str) -> Iterator[Documented]:
    """Yield what a package documents, in order of its files."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"package {package!r} is not installed; `make demo` installs all it needs")
    root = Path(spec.submodule_search_locations[0])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if any(part.startswith(("_", "test")) for part in parts[1:]) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                summary, body = split_docstring(ast.get_docstring(node) or "")
                if len(summary.split()) in SUMMARY_WORDS and len(body.split()) in BODY_WORDS:
                    name = ".".join((*parts, node.name))
                    yield Documented(name, ".".join(parts[:3]), summary, " ".join(body.split()[:WORDS_KEPT]))


def split_docstring(text: str) -> tuple[str, str]:
    """Return the first paragraph and the rest without examples, rules and markup."""
    summary, _, body = text.strip().partition("\n\n")
    body = re.sub(r"^\s*(>>>|\.\.\.|[-=~]{3,}).*$", " ", body, flags=re.MULTILINE)
    return tuple(" ".join(re.sub(r":\w+:|\.\. \w+::|[`*]+", " ", part).split()) for part in (summary, body))  # type: ignore[return-value]


def part_of(module: str) -> str:
    """Deal a module out by a hash of its name."""
    share = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100
    for part, percent in PARTS.items():
        if share < percent:
            return part
        share -= percent
    raise AssertionError("the shares of the parts add up to 100")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.docstrings", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--test-queries", type=int, default=100, help="test queries to keep (default: %(default)s)")
    args = parser.parse_args(argv)
    found: dict[str, Documented] = {}
    seen: set[str] = set()
    repeated = 0
    for package in PACKAGES:
        for item in documented(package):
            if item.summary.lower() in seen or item.body in seen:
                repeated += 1
                continue
            seen |= {item.summary.lower(), item.body}
            found[item.doc_id] = item
    with atomic_folder(args.output, overwrite=True) as folder:
        with open(folder / "corpus.jsonl", "w", encoding="utf-8") as corpus:
            for item in found.values():
                corpus.write(json.dumps({"doc_id": item.doc_id, "text": item.body}) + "\n")
        parts: dict[str, list[Documented]] = {part: [] for part in PARTS}
        for item in found.values():
            parts[part_of(item.module)].append(item)
        parts["test"].sort(key=lambda item: hashlib.sha256(item.doc_id.encode()).hexdigest())
        del parts["test"][args.test_queries :]
        for part, items in parts.items():
            (folder / f"{part}.ids").write_text("".join(f"{item.doc_id}\n" for item in items), "utf-8")
            lines = (f"{item.doc_id}\t{item.summary}\n" for item in items)
            (folder / f"queries.{part}.tsv").write_text("".join(lines), "utf-8")
        for name, items in (("qrels.txt", list(found.values())), ("qrels.test.txt", parts["test"])):
            (folder / name).write_text("".join(f"{item.doc_id} 0 {item.doc_id} 1\n" for item in items), "utf-8")
    counts = ", ".join(f"{len(items)} {part}" for part, items in parts.items())
    print(f"{repeated:>6,}  left out: text that stands elsewhere too")
    print(f"Wrote {len(found):,} passages to {args.output}; queries: {counts}")


if __name__ == "__main__":
    run_command(main)

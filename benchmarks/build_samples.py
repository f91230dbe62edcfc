"""How fast and how large: runs into samples, and samples into a training step.

    python benchmarks/build_samples.py --model BACKBONE --folder F [--lines 1 5 20] [--passages 1000000]

Makes a synthetic collection and runs (kept in the folder), tokenises the collection once, then times a build of each
size in a process of its own, and reads lists from the largest one: as training does, and as a data set does that keeps
the run in pandas groups and looks every text up in a document store.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

DEPTH = 200  # lines of a query
WORDS_PER_PASSAGE = 20
VOCABULARY = 30_000


def make_collection(folder: Path, passages: int, queries: int) -> None:
    """Write passages of made-up words, drawn by Zipf's law, and a relevant passage a query."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(draw.choice(letters, size)) for size in draw.integers(2, 9, VOCABULARY)])
    with open(folder / "corpus.jsonl", "w") as file:
        for doc in range(passages):
            numbers = np.minimum(draw.zipf(1.2, WORDS_PER_PASSAGE), VOCABULARY) - 1
            file.write(json.dumps({"doc_id": str(doc), "text": " ".join(words[numbers])}) + "\n")
    with open(folder / "queries.tsv", "w") as file:
        file.writelines(f"{query}\t{' '.join(draw.choice(words, 6))}\n" for query in range(queries))
    with open(folder / "qrels.txt", "w") as file:
        file.writelines(f"{query} 0 {draw.integers(passages)} 1\n" for query in range(queries))


def make_run(path: Path, lines: int, passages: int) -> None:
    """Write a run of `lines` lines, `DEPTH` a query."""
    draw = np.random.default_rng(1)
    with open(path, "w") as file:
        for query in range(lines // DEPTH):
            docs = draw.choice(passages, DEPTH, replace=False).tolist()
            scores = np.sort(draw.normal(20, 3, DEPTH))[::-1].tolist()
            rows = [f"{query} Q0 {doc} {n} {score:.5f} bm25\n" for n, (doc, score) in enumerate(zip(docs, scores), 1)]
            file.writelines(rows)


def timed(words: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, those of its processors, and the peak of its memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(error.decode())
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def private_megabytes() -> float:
    """Return the memory that this process shares with no other and that no file stands behind."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_Dirty")) / 1024


def reference_lists(run: Path, collection: Path, count: int, size: int) -> float:
    """Return seconds a list of a run in pandas groups, each passage looked up in an ir_datasets document store."""
    import ir_datasets
    import pandas
    from ir_datasets.formats import JsonlDocs
    from ir_datasets.util import LocalDownload

    columns = ["query_id", "q0", "doc_id", "rank", "score", "tag"]
    types = {"query_id": str, "doc_id": str}
    frame = pandas.read_csv(run, sep=r"\s+", names=columns, dtype=types, nrows=2_000_000)
    groups = frame.groupby("query_id")
    docs = JsonlDocs(LocalDownload(collection / "corpus.jsonl"), mapping={"doc_id": "doc_id", "text": "text"})
    store = ir_datasets.Dataset(docs).docs_store()
    store.get("0")  # builds the store
    query_ids = np.random.default_rng(2).choice(list(groups.groups), count)
    start = time.perf_counter()
    for query_id in query_ids:
        rows = groups.get_group(query_id).sort_values("rank").sample(size, random_state=0)
        assert len([store.get(doc_id).default_text() for doc_id in rows["doc_id"]]) == size
    return (time.perf_counter() - start) / count


def feed(samples: Path, model: str, count: int, size: int) -> dict[str, float]:
    """Return what lists from stored samples cost, beside a training step of the model."""
    import torch

    from setenc_hf.lists import EpochSampler, ListwiseCollator, TrainingLists
    from setenc_hf.losses import RankNetLoss
    from setenc_hf.modeling import SetEncoderForReranking
    from setenc_hf.samples import ListwiseSamples

    network = SetEncoderForReranking.from_pretrained(model)
    network.train()
    before = private_megabytes()
    lists = TrainingLists([ListwiseSamples.open(samples)], network.tokenizer, "random", size)
    collate = ListwiseCollator(network.tokenizer)
    order = [item for item, _ in zip(EpochSampler(lists), range(count))]
    count = len(order)
    start = time.perf_counter()
    items = [lists[item] for item in order]
    per_list = (time.perf_counter() - start) / count
    start = time.perf_counter()
    batches = [collate(items[n : n + 4]) for n in range(0, count, 4)]
    collated = (time.perf_counter() - start) / count
    memory = private_megabytes() - before
    start = time.perf_counter()
    for batch in batches[:5]:
        labels = batch.pop("labels")
        RankNetLoss()(network(**batch).logits, labels).backward()
    step = (time.perf_counter() - start) / 20
    return {"list": per_list, "collated": collated, "memory": memory, "step": step, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="backbone whose tokenizer and training step to measure")
    parser.add_argument("--folder", type=Path, required=True, help="where data goes, some GB")
    parser.add_argument("--lines", type=float, nargs="+", default=[1, 5, 20], help="sizes of runs, in millions")
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("make", "build", "feed"), help="one part of it")
    args = parser.parse_args()
    collection, sizes = args.folder / "collection", [int(size * 1e6) for size in args.lines]
    runs = {size: args.folder / f"{size}.run" for size in sizes}
    build = ["-m", "data_prep.build_samples", "--collection", str(collection), "--labels", "relevance"]
    build += ["--depth", str(DEPTH), "--tokenizer", args.model, "--overwrite"]
    if not collection.is_dir():
        make_collection(collection, args.passages, max(sizes) // DEPTH)
    for size, run in runs.items():
        if not run.exists():
            make_run(run, size, args.passages)
    if args.only == "make":
        return
    if not (args.folder / "corpora").is_dir():
        seconds, _, _ = timed([*build, "--run", str(runs[sizes[0]]), "--output", str(args.folder / "full"),
                            "--corpus", "full", "--num-proc", "2"])  # fmt: skip
        print(f"whole collection of {args.passages:,} passages tokenised, 2 processes: {seconds:.0f} s with its build")
    if args.only in (None, "build"):
        print("| lines | corpus | seconds | processor seconds | peak memory, GB |\n| --- | --- | --- | --- | --- |")
        for size, run in runs.items():
            for corpus in ("referenced", "full"):
                output = args.folder / f"{corpus}-{size}"
                shutil.rmtree(output, ignore_errors=True)
                seconds, cpu, peak = timed([*build, "--run", str(run), "--output", str(output), "--corpus", corpus])
                print(f"| {size:,} | {corpus} | {seconds:.1f} | {cpu:.1f} | {peak:.2f} |", flush=True)
    if args.only in (None, "feed"):
        size = max(sizes)
        ours = feed(args.folder / f"referenced-{size}", args.model, 4_000, 8)
        theirs = reference_lists(runs[size], collection, 500, 8)
        print("| lists of 8 passages | |\n| --- | --- |")
        print(f"| drawn, with tokens, ms a list | {1e3 * ours['list']:.3f} |")
        print(f"| pandas groups and document store, text only, ms a list | {1e3 * theirs:.3f} |")
        print(f"| times faster | {theirs / ours['list']:.1f} |")
        print(f"| packed by the collator, ms a list | {1e3 * ours['collated']:.3f} |")
        print(
            f"| forward and backward of the model, ms a list ({ours['threads']} threads) | {1e3 * ours['step']:.0f} |"
        )
        print(f"| lists ready per list the model takes | {ours['step'] / (ours['list'] + ours['collated']):.0f} |")
        print(f"| private memory of {max(sizes) // DEPTH:,} lists and their tokens, MB | {ours['memory']:.0f} |")


if __name__ == "__main__":
    main()

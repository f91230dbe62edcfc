"""Passages per second of BM25 indexing, analysis included, and the peak memory of all its processes.

    python benchmarks/bm25_indexing.py [--collection DIR] [--passages 200000] [--num-proc 2] [--repeats 3]

Without a collection at most 50,000 passages are made here and repeated: 55 words of a Zipf distribution over 200,000
invented ones, one passage in five with a character beyond ASCII, as in MS MARCO. With one, its passages are repeated
under new ids.
The time is the whole build: reading, analysis, merging, and the start of the processes.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path

from data_prep.bm25_index import build_bm25
from setenc_hf.collection import open_collection


def make_texts(count: int) -> list[str]:
    """Return passages of a vocabulary with many rare words."""
    draw = random.Random(0)
    syllables = ["ba", "con", "der", "es", "fi", "ing", "ka", "lo", "men", "ni", "or", "pre", "qua", "ra", "st", "tion"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 5))) for _ in range(200_000)]
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    texts = []
    for _ in range(count):
        chosen = draw.choices(words, cum_weights=weights, k=55)
        if draw.random() < 0.2:
            chosen[draw.randrange(55)] += "\u2019s"
        texts.append(" ".join(chosen) + ".")
    return texts


def write_corpus(folder: Path, source: str | None, count: int) -> None:
    """Write a collection of `count` passages."""
    texts = [doc.text for doc in open_collection(source).docs()] if source else make_texts(min(count, 50_000))
    with open(folder / "corpus.jsonl", "w") as corpus:
        for row in range(count):
            corpus.write(json.dumps({"doc_id": str(row), "text": texts[row % len(texts)]}) + "\n")
    (folder / "queries.tsv").write_text("1\tquery\n")


def resident_memory() -> int:
    """Return the private and shared bytes in memory of this process and its children (Linux)."""
    total, page = 0, os.sysconf("SC_PAGE_SIZE")
    me = str(os.getpid())
    for process in Path("/proc").iterdir():
        try:
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if me in (process.name, parent):
                total += int((process / "statm").read_text().split()[1]) * page
        except (OSError, IndexError):
            continue
    return total


def main() -> None:
    """Build the index several times and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--collection", help="a folder whose passages are repeated")
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--memory", type=float, default=4e9)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rates, peaks = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, args.collection, args.passages)
        collection = open_collection(name)
        for repeat in range(args.repeats):
            index = folder / f"index-{repeat}"
            index.mkdir()
            peak, done = [0], threading.Event()

            def watch(peak: list[int] = peak, done: threading.Event = done) -> None:
                while not done.wait(0.2):
                    peak[0] = max(peak[0], resident_memory())

            watcher = threading.Thread(target=watch)
            watcher.start()
            start = time.perf_counter()
            build_bm25(collection, index, memory=int(args.memory), num_proc=args.num_proc)
            rates.append(args.passages / (time.perf_counter() - start))
            done.set()
            watcher.join()
            peaks.append(peak[0])
    print(f"passages per second: min {min(rates):,.0f}, median {statistics.median(rates):,.0f}, max {max(rates):,.0f}")
    print(
        f"over the target of 20,000: {statistics.median(rates) / 20_000:.2f} x; peak memory {max(peaks) / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()

"""A small collection with runs and judgements, for tests that need the whole way."""

import json
import random
from pathlib import Path

from conftest import WORDS
from data_prep.build_samples import main as build_samples


def make_collection(folder: Path, queries: int = 6, passages: int = 40, seed: int = 0) -> Path:
    """Passages about words; a query is a word, and the passages that hold it are relevant."""
    draw = random.Random(seed)
    words = [word for word in WORDS.split() if len(word) > 2]
    texts = {f"d{n}": " ".join(draw.choices(words, k=draw.randint(3, 20))) for n in range(passages)}
    topics = {f"q{n}": words[n] for n in range(queries)}
    folder.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"doc_id": doc_id, "text": text}) + "\n" for doc_id, text in texts.items())
    (folder / "corpus.jsonl").write_text("".join(rows))
    (folder / "queries.tsv").write_text("".join(f"{query_id}\t{text}\n" for query_id, text in topics.items()))
    judged = [
        f"{query_id} 0 {doc_id} {min(text.split().count(word), 3)}\n"
        for query_id, word in topics.items()
        for doc_id, text in texts.items()
    ]
    (folder / "qrels.txt").write_text("".join(judged))
    return folder


def make_run(folder: Path, name: str = "first.run", depth: int = 12, queries: int = 6, seed: int = 1) -> Path:
    """A random order of the collection's first passages."""
    draw = random.Random(seed)
    lines = []
    for n in range(queries):
        docs = draw.sample(range(40), depth)
        lines += [f"q{n} Q0 d{doc} {rank} {depth - rank} t\n" for rank, doc in enumerate(docs, start=1)]
    (folder / name).write_text("".join(lines))
    return folder / name


def make_samples(folder: Path, name: str, seed: int = 0, queries: int = 6, has_own_queries: bool = False) -> Path:
    """Listwise samples with labels of relevance, `folder / name`; own queries are none of another collection's."""
    collection = make_collection(folder / f"{name}-collection", seed=seed)
    if has_own_queries:
        lines = (f"q{n}\tthe {word} of {name}\n" for n, word in enumerate("abcdef"))
        (collection / "queries.tsv").write_text("".join(lines))
    run = make_run(collection, queries=queries, seed=seed)
    words = ["--collection", str(collection), "--labels", "relevance", "--output", str(folder / name)]
    build_samples(["--run", str(run), *words])
    return folder / name

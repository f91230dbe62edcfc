"""Re-rank a run by the cosine of mean-pooled sentence vectors: what the backbone does before any fine-tuning.

python -m benchmarks.bi_encoder --model sentence-transformers/all-MiniLM-L6-v2 --run R --collection C --output R2
"""

import argparse
from collections import Counter
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from setenc_hf.command import run_command
from setenc_hf.rerank import read_inputs
from setenc_hf.trec import write_run

TEXTS_PER_BATCH = 32


@torch.inference_mode()
def encode(  # type: ignore[no-untyped-def]
    model: torch.nn.Module, tokenizer, texts: Sequence[str], length: int, bfloat16: bool = False
) -> torch.Tensor:
    """Return unit vectors [texts, hidden], computed in batches of texts of similar length."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for start in tqdm(range(0, len(order), TEXTS_PER_BATCH), desc="encode", disable=None):
        batch = order[start : start + TEXTS_PER_BATCH]
        inputs = tokenizer(
            [texts[i] for i in batch], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            states = model(**inputs).last_hidden_state.float()  # [texts, tokens, hidden]
        mask = inputs["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        for index, vector in zip(batch, torch.nn.functional.normalize(means, dim=-1)):
            vectors[index] = vector
    return torch.stack(vectors)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bi_encoder", description=__doc__.split("\n\n")[0])
    for name in ("model", "run", "collection", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="tokens kept of a text (default: %(default)s)")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    counts: Counter = Counter()
    inputs = read_inputs(args.run, args.collection, args.depth, counts)
    model, tokenizer = AutoModel.from_pretrained(args.model).eval(), AutoTokenizer.from_pretrained(args.model)
    texts = {doc_id: text for item in inputs for doc_id, text in zip(item.doc_ids, item.passages)}
    places = {doc_id: place for place, doc_id in enumerate(texts)}
    passages = encode(model, tokenizer, list(texts.values()), args.length)
    queries = encode(model, tokenizer, [item.query for item in inputs], args.length)
    lists = (
        (
            item.query_id,
            list(zip(item.doc_ids, (passages[[places[doc_id] for doc_id in item.doc_ids]] @ query).tolist())),
        )
        for item, query in zip(inputs, queries)
    )
    lines = write_run(args.output, lists, "bi-encoder")
    print(f"Re-ranked {len(inputs):,} lists ({lines:,} passages); wrote {args.output}")


if __name__ == "__main__":
    run_command(main)

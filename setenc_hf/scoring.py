"""Score many lists with one model, tokenising the next list while the present one is computed."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from transformers import BatchEncoding

from .modeling import SetEncoderForReranking
from .packing import Ids
from .tokenization import SetEncoderTokenizer


class QueryPassages(NamedTuple):
    """A query and the passages to score for it, all as text."""

    query_id: str
    query: str
    doc_ids: Sequence[str]
    passages: Sequence[str]


class ScoredList(NamedTuple):
    """The scores of a list, aligned with its `doc_ids`."""

    query_id: str
    doc_ids: Sequence[str]
    scores: list[float]


MAX_TOKENS_PER_BATCH = 16_384


@torch.inference_mode()
def score_lists(
    model: SetEncoderForReranking,
    tokenizer: SetEncoderTokenizer,
    lists: Iterable[QueryPassages],
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
) -> Iterator[ScoredList]:
    """Yield the scores of each list, in order; every list is scored on its own, whatever comes before or after it.

    Short lists go to the device together, up to `max_tokens_per_batch` tokens and at least one list, which saves
    copies and waiting; the next batch is tokenised and packed while the present one is computed.
    """
    model.eval()
    batches = pack_batches(tokenizer, lists, max_tokens_per_batch)
    with ThreadPoolExecutor(max_workers=1) as ahead:  # the tokenizer works outside Python's lock
        coming = ahead.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = ahead.submit(next, batches, None)
            items, packed = batch
            rows = model(**packed.to(model.device)).logits.tolist()
            for item, scores in zip(items, rows, strict=True):
                yield ScoredList(item.query_id, item.doc_ids, scores[: len(item.passages)])


def pack_batches(
    tokenizer: SetEncoderTokenizer, lists: Iterable[QueryPassages], max_tokens: int
) -> Iterator[tuple[list[QueryPassages], BatchEncoding]]:
    """Tokenise lists and pack those that follow one another into batches of at most `max_tokens` tokens."""

    def tokenised() -> Iterator[tuple[tuple[QueryPassages, Ids, list[Ids]], Ids, list[Ids]]]:
        for item in lists:
            (query,) = tokenizer.encode_queries([item.query])
            passages = tokenizer.encode_passages(item.passages)
            yield (item, query, passages), query, passages

    for batch in tokenizer.batches(tokenised(), max_tokens):
        items, queries, passages = zip(*batch)
        yield list(items), tokenizer.pack(queries, passages)

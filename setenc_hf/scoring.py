"""Score many lists with one model, tokenising the next list while the present one is computed."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from transformers import BatchEncoding

from .modeling import SetEncoderForReranking
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


@torch.inference_mode()
def score_lists(
    model: SetEncoderForReranking, tokenizer: SetEncoderTokenizer, lists: Iterable[QueryPassages]
) -> Iterator[ScoredList]:
    """Yield the scores of each list, in order; every list is scored on its own, whatever comes before or after it."""

    def prepare(item: QueryPassages) -> tuple[QueryPassages, BatchEncoding]:
        return item, tokenizer(item.query, item.passages)

    model.eval()
    with ThreadPoolExecutor(max_workers=1) as ahead:  # the tokenizer works outside Python's lock
        source = iter(lists)
        coming = ahead.submit(prepare, first) if (first := next(source, None)) is not None else None
        while coming is not None:
            item, packed = coming.result()
            coming = ahead.submit(prepare, following) if (following := next(source, None)) is not None else None
            scores = model(**packed.to(model.device)).logits[0]
            yield ScoredList(item.query_id, item.doc_ids, scores.tolist())

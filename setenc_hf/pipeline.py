"""`pipeline("text-ranking")`: a query and its passages in, the passages best first out."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, Pipeline, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling import SetEncoderForReranking, best_first
from .tokenization import SetEncoderTokenizer

TASK = "text-ranking"


class TextRankingPipeline(Pipeline):
    """Re-ranks the passages of each query.

    Call it with `(query, passages)`, with `{"query": ..., "passages": [...]}`, or with a list or an iterator of such
    dictionaries. A passage is a text, or a dictionary with `text` and anything else, which is handed back but for
    `index` and `score`, in whose place stand the model's. Returns, per query,
    `[{"index": 3, "score": 7.1, "text": "..."}, ...]`, best first; ties keep the order of the input.

    Args:
        top_k: return this many passages of each query; all by default.
    """

    _load_tokenizer = False  # AutoTokenizer knows neither the template nor the lengths
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(self, model: SetEncoderForReranking, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        if not isinstance(model, SetEncoderForReranking):
            raise ValueError(f"{TASK!r} needs a Set-Encoder, got {type(model).__name__}")
        model.eval()  # a model handed over in training mode would score with dropout
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = SetEncoderTokenizer(tokenizer, **model.tokenizer_fields)
        elif isinstance(tokenizer, str):
            tokenizer = SetEncoderTokenizer.from_pretrained(tokenizer, **model.tokenizer_fields)
        tokenizer = tokenizer or model.open_tokenizer()
        self.tokenizer = model.tokenizer = tokenizer

    def __call__(self, inputs: Any, passages: Any = None, **kwargs: Any) -> Any:
        if passages is not None:
            inputs = {"query": inputs, "passages": list(passages)}
        elif isinstance(inputs, str):
            raise ValueError(f"a query without passages: call it with (query, passages), got {inputs[:80]!r}")
        elif isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], str):
            inputs = {"query": inputs[0], "passages": list(inputs[1])}
        # lists differ in their number of passages, which a stock batch cannot hold
        return super().__call__(inputs, **{**kwargs, "batch_size": 1})

    def _sanitize_parameters(self, top_k: int | None = None, **_: Any) -> tuple[dict, dict, dict]:
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}")
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, inputs: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        if not isinstance(inputs, Mapping) or not {"query", "passages"} <= inputs.keys():
            raise ValueError('one query is {"query": "...", "passages": ["...", ...]}, got ' + repr(inputs)[:120])
        passages = [passage if isinstance(passage, Mapping) else {"text": passage} for passage in inputs["passages"]]
        texts = [passage["text"] for passage in passages]
        packed = self.tokenizer(inputs["query"], texts) if texts else None
        return {"packed": packed, "passages": passages}

    def _forward(self, inputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        packed = inputs.pop("packed")
        scores = self.model(**packed).logits[0] if packed is not None else torch.empty(0)
        return {"scores": scores, "passages": inputs["passages"]}

    def postprocess(self, outputs: dict[str, Any], top_k: int | None = None, **_: Any) -> list[dict[str, Any]]:
        scores, passages = outputs["scores"].tolist(), outputs["passages"]
        order = best_first(scores)[:top_k]
        return [{**passages[index], "index": index, "score": scores[index]} for index in order]

    def get_iterator(self, inputs: Iterable, num_workers: int, batch_size: int, *params: Any) -> Iterator:
        """Run query after query: the stock iterator needs a collator for its batches, and lists have none."""
        return (self.run_single(query, *params) for query in inputs)


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=TextRankingPipeline, pt_model=AutoModelForSequenceClassification, type="text"
)

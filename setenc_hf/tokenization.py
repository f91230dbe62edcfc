"""From text to packed tokens: queries and passages are cut each to its own length, the template never is."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .packing import Ids, Template, pack

INT_TOKEN = "[INT]"
CONFIG_FILE = "tokenizer_config.json"
LIGHTNING_IR_FIELDS = ("tokenizer_class", "backbone_tokenizer_class", "add_extra_token", "doc_length")


class SetEncoderTokenizer:
    """A backbone's tokenizer that makes `[CLS] [INT] query [SEP] passage [SEP]` of a query and each of its passages.

    Args:
        backend: the backbone's own (fast) tokenizer; `[INT]` is added to it where needed and missing.
        interaction: `int`, `cls` or `none`, as in [`SetEncoderConfig`].
        query_length, passage_length: tokens that are kept of a query and of a passage.
    """

    model_input_names = ("input_ids", "position_ids", "token_type_ids")

    def __init__(
        self,
        backend: PreTrainedTokenizerBase,
        interaction: str = "int",
        query_length: int = 32,
        passage_length: int = 256,
    ) -> None:
        for name, length in (("query_length", query_length), ("passage_length", passage_length)):
            if length < 1:
                raise ValueError(f"`{name}` must be at least 1 token, got {length}")
        if not backend.is_fast or backend.cls_token_id is None or backend.sep_token_id is None:
            raise ValueError(f"{type(backend).__name__} is not a fast tokenizer with [CLS] and [SEP] tokens")
        self.is_int_new = interaction == "int" and INT_TOKEN not in backend.get_vocab()
        if self.is_int_new:
            backend.add_tokens([AddedToken(INT_TOKEN, special=True, normalized=False)], special_tokens=True)
        self.backend = backend
        self.interaction = interaction
        self.query_length = query_length
        self.passage_length = passage_length
        self.template = Template(
            cls_id=backend.cls_token_id,
            sep_id=backend.sep_token_id,
            int_id=backend.convert_tokens_to_ids(INT_TOKEN) if interaction == "int" else None,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        interaction: str | None = None,
        query_length: int | None = None,
        passage_length: int | None = None,
        **hub: Any,
    ) -> "SetEncoderTokenizer":
        """Open the tokenizer of a Set-Encoder, ours or lightning-ir's, or of a plain backbone.

        What is not given is what the folder or hub id says, else the defaults of the class.
        """
        backend = AutoTokenizer.from_pretrained(name_or_path, use_fast=True, **hub)
        path = cached_file(name_or_path, CONFIG_FILE, _raise_exceptions_for_missing_entries=False, **hub)
        stored = json.loads(Path(path).read_text("utf-8")) if path else {}
        if interaction is None and "add_extra_token" in stored:  # lightning-ir's names
            interaction = "int" if stored["add_extra_token"] else "cls"
        given = {"interaction": interaction, "query_length": query_length, "passage_length": passage_length}
        stored.setdefault("passage_length", stored.get("doc_length"))
        settings: dict[str, Any] = {name: stored.get(name) if value is None else value for name, value in given.items()}
        return cls(backend, **{name: value for name, value in settings.items() if value is not None})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        """Save the backend's files with our settings in `tokenizer_config.json`."""
        for name in ("interaction", "query_length", "passage_length"):
            self.backend.init_kwargs[name] = getattr(self, name)
        for name in (
            "tokenizer_class",
            "backbone_tokenizer_class",
            "add_extra_token",
            "doc_length",
            "scoring_strategy",
        ):
            self.backend.init_kwargs.pop(name, None)  # a lightning-ir folder's, which would be read again as ours
        return self.backend.save_pretrained(save_directory, **kwargs)

    def encode_queries(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of queries, each cut at `query_length`, without special tokens."""
        return self._encode(texts, self.query_length)

    def encode_passages(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of passages, each cut at `passage_length`, without special tokens."""
        return self._encode(texts, self.passage_length)

    def pack(self, queries: Sequence[Ids], passages: Sequence[Sequence[Ids]]) -> BatchEncoding:
        """Pack tokenised lists for the model, cutting each query and passage; see [`~setenc_hf.packing.pack`]."""
        cut = [[passage[: self.passage_length] for passage in texts] for texts in passages]
        return BatchEncoding(pack([query[: self.query_length] for query in queries], cut, self.template))

    def num_tokens(self, query: Ids, passages: Sequence[Ids]) -> int:
        """Return how many tokens a tokenised list takes when it is packed."""
        around = min(len(query), self.query_length) + self.template.num_special
        return sum(min(len(passage), self.passage_length) + around for passage in passages)

    def batches(self, lists: Iterable[tuple[Any, Ids, Sequence[Ids]]], max_tokens: int) -> Iterator[list[Any]]:
        """Group `(item, query, passages)` that follow one another into batches of items of at most `max_tokens` tokens.

        A batch holds at least one list, however long.
        """
        batch: list[Any] = []
        tokens = 0
        for item, query, passages in lists:
            size = self.num_tokens(query, passages)
            if batch and tokens + size > max_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(item)
            tokens += size
        if batch:
            yield batch

    def __call__(
        self, queries: str | Sequence[str], passages: Sequence[str] | Sequence[Sequence[str]]
    ) -> BatchEncoding:
        """Tokenise and pack a query with its passages, or several queries, each with a list of passages of its own."""
        lists: Sequence[Sequence[str]]
        if isinstance(queries, str):
            queries, lists = [queries], [passages]  # type: ignore[list-item]
        else:
            lists = passages  # type: ignore[assignment]
        if len(queries) != len(lists):
            raise ValueError(f"got {len(queries)} queries but {len(lists)} lists of passages; give one list a query")
        if any(isinstance(texts, str) or not len(texts) for texts in lists):
            raise ValueError("the passages of a query are a non-empty list of texts")
        flat = iter(self.encode_passages([text for texts in lists for text in texts]))
        return self.pack(self.encode_queries(queries), [[next(flat) for _ in texts] for texts in lists])

    def __len__(self) -> int:
        return len(self.backend)

    def _encode(self, texts: Sequence[str], length: int) -> list[Ids]:
        # text that spells a special token is text: a passage must not be able to write its own [SEP] or [INT]
        encoded = self.backend(
            list(texts),
            add_special_tokens=False,
            truncation=True,
            max_length=length,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return encoded["input_ids"]

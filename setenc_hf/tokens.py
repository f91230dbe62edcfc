"""Texts tokenised once: a memory-mapped table of token ids beside the samples they belong to."""

import bisect
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from .files import atomic_folder
from .samples import ListwiseSamples, batched

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
TEXTS_PER_BATCH = 2_000
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])


class TokenTable:
    """Token ids by row number, uncut and without special tokens; read from disk as they are used."""

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.chunks = [
            (np.asarray(chunk.offsets), np.asarray(chunk.values)) for chunk in table.column("input_ids").chunks
        ]
        self.starts = np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self.chunks)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the token ids of a row [tokens], int32."""
        chunk = bisect.bisect_right(self.starts, row) - 1
        offsets, values = self.chunks[chunk]
        place = row - self.starts[chunk]
        return values[offsets[place] : offsets[place + 1]]


class TextTokens:
    """Token ids by row number like a `TokenTable`'s, made from a column of texts at every call."""

    def __init__(self, dataset: "Dataset", column: str, backend: "PreTrainedTokenizerBase") -> None:
        self.dataset, self.column, self.backend = dataset, column, backend

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> np.ndarray:
        return np.asarray(token_ids(self.backend, [self.dataset[row][self.column]])[0], np.int32)


class SampleTokens:
    """The tokenised corpus and queries of a folder of samples."""

    def __init__(self, passages: "TokenTable | TextTokens", queries: "TokenTable | TextTokens") -> None:
        self.passages = passages
        self.queries = queries

    @classmethod
    def of(cls, samples: ListwiseSamples, backend: "PreTrainedTokenizerBase", store: bool = True) -> "SampleTokens":
        """Open the tokens of `samples` under this tokenizer, and make them first where they are not there yet.

        Without `store` nothing is written: tokens that are not there are made as they are asked for.

        The folder is named by a hash of everything the tokenizer does to text, so that another tokenizer, or another
        version of one that does something else, gets a table of its own.
        """
        folder = samples.folder / "tokens" / fingerprint(backend)
        if not folder.exists() and not store:
            corpus, queries = samples.corpus, samples.samples
            return cls(TextTokens(corpus, "text", backend), TextTokens(queries, "query", backend))
        if not folder.exists():
            logger.info(
                "Tokenising %d passages and %d queries of %s", len(samples.corpus), len(samples), samples.folder
            )
            with atomic_folder(folder) as partial:
                for name, dataset, column in (
                    ("passages", samples.corpus, "text"),
                    ("queries", samples.samples, "query"),
                ):
                    texts = (text for batch in dataset.iter(TEXTS_PER_BATCH) for text in batch[column])
                    write_tokens(partial / f"{name}.arrow", backend, texts)
        return cls(TokenTable(folder / "passages.arrow"), TokenTable(folder / "queries.arrow"))


def write_tokens(path: Path, backend: "PreTrainedTokenizerBase", texts: Iterable[str]) -> None:
    """Tokenise texts, batch by batch, into a table."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch in batched(texts, TEXTS_PER_BATCH):
            ids = token_ids(backend, batch)
            writer.write_batch(pa.record_batch([pa.array(ids, SCHEMA.field(0).type)], schema=SCHEMA))


def token_ids(backend: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Return the token ids of texts, uncut and without special tokens; text that spells one stays text."""
    return backend(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model is fine here: the collator cuts
    )["input_ids"]


def fingerprint(backend: "PreTrainedTokenizerBase") -> str:
    """Return a hash of the tokenizer's normaliser, splitter, model and vocabulary; not of how it pads or cuts."""
    import json

    parts = json.loads(backend.backend_tokenizer.to_str())
    kept = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

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


class SampleTokens:
    """The tokenised corpus and queries of a folder of samples."""

    def __init__(self, folder: Path) -> None:
        self.passages = TokenTable(folder / "passages.arrow")
        self.queries = TokenTable(folder / "queries.arrow")

    @classmethod
    def of(cls, samples: ListwiseSamples, backend: "PreTrainedTokenizerBase") -> "SampleTokens":
        """Open the tokens of `samples` under this tokenizer, and make them first where they are not there yet.

        The folder is named by a hash of everything the tokenizer does to text, so that another tokenizer, or another
        version of one that does something else, gets a table of its own.
        """
        folder = samples.folder / "tokens" / fingerprint(backend)
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
        return cls(folder)


def write_tokens(path: Path, backend: "PreTrainedTokenizerBase", texts: Iterable[str]) -> None:
    """Tokenise texts, batch by batch, into a table; text that spells a special token stays text."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch in batched(texts, TEXTS_PER_BATCH):
            ids = backend(
                batch,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # longer than the model is fine here: the collator cuts
            )["input_ids"]
            writer.write_batch(pa.record_batch([pa.array(ids, SCHEMA.field(0).type)], schema=SCHEMA))


def fingerprint(backend: "PreTrainedTokenizerBase") -> str:
    """Return a hash of the tokenizer's normaliser, splitter, model and vocabulary; not of how it pads or cuts."""
    import json

    parts = json.loads(backend.backend_tokenizer.to_str())
    kept = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

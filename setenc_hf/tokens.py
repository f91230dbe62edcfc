"""Texts tokenised once: a memory-mapped table of token ids beside the samples they belong to."""

import bisect
import hashlib
import itertools
import json
import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from .files import shared_folder
from .samples import ListwiseSamples

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
TEXTS_PER_BATCH = 2_000
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32()))])
Ragged = tuple[np.ndarray, np.ndarray]  # token ids of texts, one behind the other, and the length of each


class TokenTable:
    """Token ids by row number, uncut and without special tokens; read from disk as they are used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.chunks = [
            (np.asarray(chunk.offsets), np.asarray(chunk.values)) for chunk in table.column("input_ids").chunks
        ]
        self.starts = np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self.chunks)]).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenTable, (self.path,)  # a process that is started anew maps the file itself

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
        self.dataset, self.column = dataset, column
        self.tokenizer = _open(backend.backend_tokenizer.to_str())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> np.ndarray:
        return _encode([self.dataset[row][self.column]], self.tokenizer)[0]


class KnownTokens(NamedTuple):
    """Tokens that were made before: `rows` says where each text stands in `table`, -1 where it does not."""

    table: TokenTable
    rows: np.ndarray


class SampleTokens:
    """The tokenised corpus and queries of a folder of samples."""

    def __init__(self, passages: TokenTable | TextTokens, queries: TokenTable | TextTokens) -> None:
        self.passages = passages
        self.queries = queries

    @classmethod
    def of(
        cls,
        samples: ListwiseSamples,
        backend: "PreTrainedTokenizerBase",
        num_proc: int = 1,
        known: Sequence[KnownTokens] = (),
        store: bool = True,
    ) -> "SampleTokens":
        """Open the tokens of `samples` under this tokenizer, and make them first where they are not there yet.

        Without `store` nothing is written: tokens that are not there are made as they are asked for.

        The folder is named by a hash of everything the tokenizer does to text, so that another tokenizer, or another
        version of one that does something else, gets a table of its own. Processes that make the same tokens at once
        do not disturb each other. `known` tokens of passages are taken over; `num_proc` processes make the others.
        """
        folder = tokens_folder(samples.folder, backend)
        if not folder.exists() and not store:
            corpus, queries = samples.corpus, samples.samples
            return cls(TextTokens(corpus, "text", backend), TextTokens(queries, "query", backend))
        if not folder.exists():
            logger.info(
                "Tokenising %d passages and %d queries of %s", len(samples.corpus), len(samples), samples.folder
            )
            texts, query_texts = samples.corpus.data.table["text"], samples.samples.data.table["query"]
            with shared_folder(folder) as partial, encoder(backend, num_proc) as encode:
                write_tokens(partial / "passages.arrow", encode, texts, known)
                write_tokens(partial / "queries.arrow", encode, query_texts)
        return cls(TokenTable(folder / "passages.arrow"), TokenTable(folder / "queries.arrow"))


def tokens_folder(folder: Path, backend: "PreTrainedTokenizerBase") -> Path:
    """Return where the tokens of a folder's texts are kept."""
    return folder / "tokens" / fingerprint(backend)


def write_tokens(
    path: Path,
    encode: Callable[[Iterator[list[str]]], Iterator[Ragged]],
    texts: pa.ChunkedArray,
    known: Sequence[KnownTokens] = (),
) -> None:
    """Write the token ids of texts as a table, in bounded memory; those that are `known` are not made again."""
    source = np.full(len(texts), -1)  # which of the known tables has the text
    for number, part in enumerate(known):
        source[(source < 0) & (part.rows >= 0)] = number
    starts = range(0, len(texts), TEXTS_PER_BATCH)

    def unknown() -> Iterator[list[str]]:
        for start in starts:
            batch = texts.slice(start, TEXTS_PER_BATCH)
            yield batch.filter(pa.array(source[start : start + TEXTS_PER_BATCH] < 0)).to_pylist()

    progress = tqdm(total=len(texts), desc=path.stem, unit=" texts", unit_scale=True, disable=None)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer, progress:
        for start, made in zip(starts, encode(unknown()), strict=True):
            values, lengths = made
            sources = source[start : start + TEXTS_PER_BATCH]
            if (sources >= 0).any():
                new = iter(np.split(values, np.cumsum(lengths)[:-1]))
                rows = range(start, start + len(sources))
                values, lengths = _join(
                    [next(new) if k < 0 else known[k].table[known[k].rows[row]] for row, k in zip(rows, sources)]
                )
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=SCHEMA.field(0).type)
            writer.write_batch(pa.record_batch([ids], schema=SCHEMA))
            progress.update(len(lengths))


@contextmanager
def encoder(
    backend: "PreTrainedTokenizerBase", num_proc: int
) -> Iterator[Callable[[Iterator[list[str]]], Iterator[Ragged]]]:
    """Give a function that tokenises batches of texts, in their order, uncut and without special tokens.

    Text that spells a special token stays text. More than one process is started anew, not forked: tokenizers keep
    threads that a fork would lose.
    """
    definition = backend.backend_tokenizer.to_str()
    if num_proc == 1:
        tokenizer = _open(definition)
        yield lambda batches: (_encode(batch, tokenizer) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, context, _start_process, (definition,)) as pool:
        yield lambda batches: _in_order(pool, batches, 2 * num_proc)


def _in_order(pool: Executor, batches: Iterator[list[str]], ahead: int) -> Iterator[Ragged]:
    """Yield the results of batches in their order, with at most `ahead` of them under way."""
    pending: deque[Future[Ragged]] = deque()
    for batch in batches:
        pending.append(pool.submit(_encode, batch))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_tokenizer: "Tokenizer"  # of a process of the pool


def _start_process(definition: str) -> None:
    global _tokenizer
    _tokenizer = _open(definition)


def _open(definition: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode(texts: list[str], tokenizer: "Tokenizer | None" = None) -> Ragged:
    encodings = (tokenizer or _tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _join(parts: Sequence[np.ndarray]) -> Ragged:
    lengths = np.fromiter(map(len, parts), np.int32, len(parts))
    return np.concatenate([np.empty(0, np.int32), *parts]), lengths


def fingerprint(backend: "PreTrainedTokenizerBase") -> str:
    """Return a hash of the tokenizer's normaliser, splitter, model and vocabulary; not of how it pads or cuts."""
    parts = json.loads(backend.backend_tokenizer.to_str())
    kept = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

"""Corpora kept for later builds: the passages of a collection and their tokens, as files that samples share.

    DIR/<collection>/<passages>/corpus/                       Arrow: doc_id, text
    DIR/<collection>/<passages>/tokens/<tokenizer>/passages.arrow

Each name is a hash of what it stands for, so that other data or another tokenizer never meets it. Files are hard
links: they take no room twice, and samples stay whole when this folder is deleted.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from setenc_hf.collection import Collection
from setenc_hf.files import link_or_copy, shared_folder
from setenc_hf.samples import open_arrow
from setenc_hf.tokens import KnownTokens, TokenTable

FULL = "full"  # the name of the whole collection; others are named by a hash of their passages' ids
TOKENS = "passages.arrow"


class Corpora:
    """The kept corpora of one collection.

    Args:
        folder: of all collections; made when something is kept.
        collection: whose passages to keep and look for.
    """

    def __init__(self, folder: Path, collection: Collection) -> None:
        name = hashlib.sha256(json.dumps(collection.corpus_sources(), sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / name

    def link_full(self, corpus: Path) -> bool:
        """Link the whole collection as `corpus`; False where it is not kept."""
        kept = self.folder / FULL / "corpus"
        if not kept.is_dir():
            return False
        corpus.mkdir()
        for file in kept.iterdir():
            link_or_copy(file, corpus / file.name)
        return True

    def known_tokens(self, doc_ids: pa.ChunkedArray, tokenizer: str) -> Iterator[KnownTokens]:
        """Yield kept tokens of some of these passages, until none is missing."""
        missing = np.ones(len(doc_ids), bool)
        for table in sorted(self.folder.glob(f"*/tokens/{tokenizer}/{TOKENS}")):
            ids = open_arrow(table.parents[2] / "corpus").column("doc_id")
            # a whole collection is looked up in the few passages wanted, not the other way round
            places = pc.index_in(ids, doc_ids.combine_chunks()).to_numpy(zero_copy_only=False)
            found = np.flatnonzero(~np.isnan(places)) if places.dtype.kind == "f" else np.arange(len(places))
            rows = np.full(len(doc_ids), -1)
            rows[places[found].astype(np.int64)] = found
            if (missing & (rows >= 0)).any():
                missing &= rows < 0
                yield KnownTokens(TokenTable(table), rows)
            if not missing.any():
                return

    def keep(self, samples: Path, name: str, tokenizer: str | None) -> None:
        """Link the corpus of a folder of samples here, and its tokens; what is kept already stays as it is."""
        entry = self.folder / name
        if not (entry / "corpus").is_dir():
            with shared_folder(entry / "corpus") as partial:
                for file in sorted((samples / "corpus").iterdir()):
                    link_or_copy(file, partial / file.name)
        if tokenizer is not None and not (entry / "tokens" / tokenizer).is_dir():
            with shared_folder(entry / "tokens" / tokenizer) as partial:
                link_or_copy(samples / "tokens" / tokenizer / TOKENS, partial / TOKENS)


def name_of(doc_ids: pa.ChunkedArray) -> str:
    """Return the name of a corpus of these passages, in this order."""
    digest = hashlib.sha256()
    for chunk in doc_ids.chunks:
        digest.update("\n".join(chunk.to_pylist()).encode() + b"\n")
    return digest.hexdigest()[:16]

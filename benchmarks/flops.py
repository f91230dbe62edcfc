"""What a list costs at the least, and what the machine can do at the most: the two ends of a share of the peak."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MATRIX_SIZES = (1024, 2048, 4096)


def linear_flops(config: dict[str, Any], tokens: int, passages: int) -> int:
    """Return the floating-point operations of the linear layers in one forward pass without padding.

    Every layer of a BERT-like backbone is counted whole, for every token: queries, keys, values and the attention's
    output (4 hidden^2), and the feed-forward part (2 hidden x intermediate); a multiplication and an addition are
    two operations. Attention itself is not counted. A model that leaves out what the score does not need (the last
    layer behind `[CLS]`) is credited with the whole all the same.

    Args:
        config: the backbone's configuration: `hidden_size`, `intermediate_size`, `num_hidden_layers`.
        tokens: of all passages, their special tokens and their copies of the query included.
        passages: each has one score, from one `[CLS]`.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    per_token = config["num_hidden_layers"] * (4 * hidden * hidden + 2 * hidden * inner)
    return 2 * (tokens * per_token + passages * hidden)


def packed_tokens(query: int, passages: Iterable[int], query_length: int, passage_length: int, special: int = 4) -> int:
    """Return the tokens of a list from those of its query and of its passages, before they are cut.

    `special` are those that every passage adds: `[CLS] [INT] query [SEP] passage [SEP]`.
    """
    return sum(special + min(query, query_length) + min(passage, passage_length) for passage in passages)


def count_tokens(folder: Path, query: str, passages: Sequence[str], query_length: int, passage_length: int) -> int:
    """Return the tokens of a list of texts; `folder` holds the `tokenizer.json`."""
    encoded = open_tokenizer(folder).encode_batch([query, *passages], add_special_tokens=False)
    lengths = [len(text.ids) for text in encoded]
    return packed_tokens(lengths[0], lengths[1:], query_length, passage_length)


def cut_texts(folder: Path, texts: Sequence[str], length: int) -> list[str]:
    """Return each text up to the end of its token number `length`; a shorter one stays whole."""
    encoded = open_tokenizer(folder).encode_batch(list(texts), add_special_tokens=False)
    return [text[: tokens.offsets[:length][-1][1]] if tokens.ids else text for text, tokens in zip(texts, encoded)]


def open_tokenizer(folder: Path) -> Any:
    """Open a folder's `tokenizer.json` without cutting and padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def backbone_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the backbone in a Set-Encoder's folder."""
    return json.loads((folder / "config.json").read_text("utf-8"))["encoder_config"]


def matrix_peak(dtype: str, sizes: Sequence[int] = MATRIX_SIZES, repeats: int = 4) -> float:
    """Return the most operations per second that a product of square matrices reached, by `linear` as models use it."""
    import torch

    best = 0.0
    with torch.inference_mode():
        for size in sizes:
            left, right = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
            for _ in range(repeats):
                start = time.perf_counter()
                torch.nn.functional.linear(left, right)
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best

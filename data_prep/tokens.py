"""Count the tokens of a text, and cut it to so many: by a model's own tokenizer, or by an estimate from its bytes."""

from pathlib import Path
from typing import Protocol

from setenc_hf.errors import InputError

BYTES_PER_TOKEN = 4  # English prose under current LLM vocabularies: 4 to 4.6


class TokenCounter(Protocol):
    """What knows the length of a text in tokens; `exact` is False for an estimate."""

    exact: bool

    def count(self, text: str) -> int: ...

    def cut(self, text: str, num_tokens: int) -> str: ...


class EstimatedTokens:
    """A token for every four bytes of UTF-8: near enough for a cost in English, no promise for other scripts."""

    exact = False

    def count(self, text: str) -> int:
        return -(-len(text.encode()) // BYTES_PER_TOKEN)

    def cut(self, text: str, num_tokens: int) -> str:
        return text.encode()[: num_tokens * BYTES_PER_TOKEN].decode(errors="ignore")


class ModelTokens:
    """The tokens of a tokenizer: a folder or file with `tokenizer.json`, or an id on the Hugging Face hub."""

    exact = True

    def __init__(self, name: str) -> None:
        from tokenizers import Tokenizer

        path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
        try:
            self.tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
        except Exception as error:  # tokenizers raises bare Exception for every cause
            raise InputError(f"--tokenizer {name}: no tokenizer could be loaded ({str(error)[:200]})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def cut(self, text: str, num_tokens: int) -> str:
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        if num_tokens >= len(offsets):
            return text
        return text[: offsets[num_tokens - 1][1]] if num_tokens else ""


def token_counter(name: str | None) -> TokenCounter:
    """Return the counter of this tokenizer, or the estimate where none is named."""
    return ModelTokens(name) if name else EstimatedTokens()


def share_tokens(lengths: list[int], budget: int) -> int:
    """Return the largest length to which texts of these `lengths` may be cut so that together they fit `budget`.

    Short texts leave their unused share to the long ones. At least 0; the longest length where all fit uncut.
    """
    remaining, count = budget, len(lengths)
    for length in sorted(lengths):
        if length * count > remaining:
            return max(remaining // count, 0)
        remaining -= length
        count -= 1
    return max(lengths, default=0)

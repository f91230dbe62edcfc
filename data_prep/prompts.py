"""From a query and the passages of a window to the messages an LLM is asked with.

The chat form is that of RankGPT (Sun et al. 2023, arXiv 2304.09542): one message per passage, each acknowledged by the
assistant; the single-message form is what open listwise re-rankers such as RankVicuna (arXiv 2309.15088) were tuned on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from setenc_hf.errors import InputError
from setenc_hf.files import read_lines

from .tokens import TokenCounter, share_tokens

Message = dict[str, str]

SYSTEM = "You are a search assistant that orders passages by how well they answer a query."
ARROW_FORMAT = (
    "Give every identifier once, the most relevant passage first, in the form [] > [], e.g. [2] > [1]. "
    "Answer with the ranking alone, without any explanation."
)
JSON_FORMAT = (
    'Answer with a JSON object {"ranking": [...]} that gives every identifier once as a whole number, '
    "the most relevant passage first."
)
TOKENS_PER_MESSAGE = 4  # what a chat template adds around a message
PLACEHOLDER = re.compile(r"\{(query|passages|num_passages)\}")
FORMS = ("rank_gpt", "single_message")


@dataclass(frozen=True)
class Prompt:
    """A form of prompt: `form` is one of `FORMS`, or `template` holds the user's own single message."""

    form: str = "rank_gpt"
    template: str | None = None
    system: str = SYSTEM
    structured: bool = False
    passage_words: int = 300
    context_tokens: int | None = None

    def messages(self, query: str, passages: Sequence[str], counter: TokenCounter, answer_tokens: int) -> list[Message]:
        """Return the messages that ask for a ranking of `passages`, numbered from 1 in the order given.

        Passages are cut to `passage_words` words and, with `context_tokens`, further so that prompt and an answer of
        `answer_tokens` fit; raises `InputError` where not even the empty frame of the prompt does.
        """
        query = one_line(query)
        cut = [" ".join(one_line(passage).split(" ")[: self.passage_words]) for passage in passages]
        if self.context_tokens is not None:
            frame = count_tokens(self._fill(query, [""] * len(cut)), counter)
            room = self.context_tokens - answer_tokens - frame
            longest = share_tokens([counter.count(passage) for passage in cut], room)
            if longest < 1:
                raise InputError(
                    f"--context-tokens {self.context_tokens}: {len(cut)} passages, their frame of {frame} tokens and "
                    f"an answer of {answer_tokens} do not fit; use a smaller --window-size or --max-answer-tokens"
                )
            cut = [counter.cut(passage, longest) for passage in cut]
        return self._fill(query, cut)

    def _fill(self, query: str, passages: Sequence[str]) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        if self.template is None and self.form == "rank_gpt":
            return system + self._chat(query, passages)
        numbered = "\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, start=1))
        values = {"query": query, "passages": numbered, "num_passages": str(len(passages))}
        template = self.template or (
            "Below are {num_passages} passages, each under its number in brackets. "
            "Order them by their relevance to the query: {query}\n\n{passages}\n\n"
            "Query: {query}\nOrder the {num_passages} passages above by their relevance to the query. "
            + self._answer_format
        )
        # one substitution for all placeholders, so that a passage that reads "{query}" stays as it is
        return [*system, {"role": "user", "content": PLACEHOLDER.sub(lambda match: values[match[1]], template)}]

    def _chat(self, query: str, passages: Sequence[str]) -> list[Message]:
        opening = (
            f"I will give you {len(passages)} passages, each under its number in brackets. "
            f"Order them by their relevance to the query: {query}"
        )
        closing = (
            f"Query: {query}\nOrder the {len(passages)} passages above by their relevance to the query. "
            + self._answer_format
        )
        messages = [_user(opening), _assistant("Please give me the passages.")]
        for number, passage in enumerate(passages, start=1):
            messages += [_user(f"[{number}] {passage}"), _assistant(f"I have passage [{number}].")]
        return [*messages, _user(closing)]

    @property
    def _answer_format(self) -> str:
        return JSON_FORMAT if self.structured else ARROW_FORMAT


def read_template(path: str) -> str:
    """Read a prompt template: text in which `{query}`, `{passages}` and `{num_passages}` are filled in.

    `{passages}` becomes one line `[n] text` for each passage; other braces stay. Raises `InputError` where a template
    names no passages or no query.
    """
    template = "\n".join(line for _, line in read_lines(path))
    for needed in ("{query}", "{passages}"):
        if needed not in template:
            raise InputError(f"{path}: a prompt template must hold {needed}; {{num_passages}} may be given too")
    return template


def one_line(text: str) -> str:
    """Put a text on one line, with `[12]` as `(12)`: neither may look like the next passage or its identifier."""
    return re.sub(r"\[(\d+)\]", r"(\1)", " ".join(text.split()))


def count_tokens(messages: Sequence[Message], counter: TokenCounter) -> int:
    """Return how many tokens a prompt has, a few for the frame of each message included."""
    return sum(counter.count(message["content"]) + TOKENS_PER_MESSAGE for message in messages)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}

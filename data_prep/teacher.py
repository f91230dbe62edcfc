"""Take lists through their windows: what to ask next, what an answer means, what became of it all.

Everything here works on the journal alone. Asking a server, a batch, a replay and a dry run differ only in who answers
the request that `Teacher.advance` returns.
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .journal import Answer, Journal
from .permutation import Ranking, parse_permutation
from .prompts import Prompt, count_tokens
from .teacher_cost import Usage
from .tokens import TokenCounter
from .windows import SlidingWindow

CUT = "length"  # why an answer ended: at the limit on its tokens
TOKENS_PER_IDENTIFIER = 5  # "[12] > " under current LLM vocabularies


@dataclass
class TeacherList:
    """One query's passages on their way to the teacher's order; `failure` says why there will be none."""

    query_id: str
    query: str
    sliding: SlidingWindow
    failure: str | None = None


class Request(NamedTuple):
    """One question: `key` is the hash it is journaled under, `body` what is sent, the rest for the budget."""

    key: str
    query_id: str
    body: dict[str, Any]
    prompt_tokens: int
    expected: Usage


@dataclass
class Outcomes:
    """Counts over windows: well-formed, repaired (and by kind), failed, asked again.

    `cut` are those, with a ranking or without, whose last answer ended at its limit.
    """

    well_formed: int = 0
    repaired: int = 0
    repairs: Counter[str] = field(default_factory=Counter)
    asked_again: int = 0
    failed: int = 0
    cut: int = 0

    @property
    def answered(self) -> int:
        return self.well_formed + self.repaired


@dataclass
class Teacher:
    """An LLM with its prompt; `attempts` is how often a window is asked whose answer states no ranking."""

    model: str
    prompt: Prompt
    counter: TokenCounter
    texts: dict[str, str]
    journal: Journal | None
    temperature: float | None = 0.0
    answer_tokens: int = 384
    attempts: int = 5
    limit_name: str = "max_tokens"
    outcomes: Outcomes = field(default_factory=Outcomes)

    def digest(self, lists: Iterable[TeacherList]) -> str:
        """Return a hash of the queries and passages to ask about, which another collection or its next version has not.

        Of lists that have not been advanced.
        """
        digest = hashlib.sha256()
        for item in sorted(lists, key=lambda item: item.query_id):
            texts = [(doc_id, self.texts[doc_id]) for doc_id in item.sliding.doc_ids]
            digest.update(json.dumps([item.query_id, item.query, texts]).encode())
        return f"sha256 {digest.hexdigest()}"

    def advance(self, item: TeacherList) -> Request | None:
        """Take a list through every window whose answer is journaled; return the first request that is not.

        None means that the list is finished, in `item.sliding.doc_ids`, or failed, with its reason in `item.failure`.
        """
        while not item.failure and (window := item.sliding.window):
            request = self.request(item, window)
            answers = self.journal.answers.get(request.key, []) if self.journal else []
            for asked, answer in enumerate(answers[: self.attempts]):
                if ranking := read_ranking(answer, len(window)):
                    self._count(ranking.repairs, asked)
                    self.outcomes.cut += answer.finish_reason == CUT
                    item.sliding.apply(ranking.order)
                    break
            else:
                answers = answers[: self.attempts]
                # nothing but thoughts that were cut: the same question would end there again, and be paid for
                is_cut = bool(answers) and answers[-1].finish_reason == CUT
                hopeless = is_cut and not answers[-1].text.strip()
                if len(answers) < self.attempts and not hopeless:
                    return request
                self.outcomes.asked_again += len(answers) - 1
                self.outcomes.failed += 1
                self.outcomes.cut += is_cut
                limit = f", which ended at its limit of {self.answer_tokens} tokens" if is_cut else ""
                last = " ".join(answers[-1].text.split())
                item.failure = f"no ranking in {len(answers)} answers, the last: {last!r:.120}{limit}"
        return None

    def request(self, item: TeacherList, window: list[str]) -> Request:
        """Return the question about this window. Its key covers all that shapes the answer, and nothing else."""
        passages = [self.texts[doc_id] for doc_id in window]
        messages = self.prompt.messages(item.query, passages, self.counter, self.answer_tokens)
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.prompt.structured:
            body["response_format"] = ranking_schema()
        hashed = json.dumps([body, self.answer_tokens], sort_keys=True).encode()
        body[self.limit_name] = self.answer_tokens  # servers differ in the name: it is not part of the key
        prompt_tokens = count_tokens(messages, self.counter)
        expected = Usage(prompt_tokens, min(len(window) * TOKENS_PER_IDENTIFIER, self.answer_tokens))
        return Request(hashlib.sha256(hashed).hexdigest(), item.query_id, body, prompt_tokens, expected)

    def expected_usage(self, item: TeacherList) -> Usage:
        """Return the tokens of all windows still to be answered, as if every answer kept the present order."""
        total = Usage()
        sliding = copy.deepcopy(item.sliding)
        while window := sliding.window:
            total += self.request(item, window).expected
            sliding.apply(range(len(window)))
        return total

    def _count(self, repairs: dict[str, int], asked_again: int) -> None:
        self.outcomes.asked_again += asked_again
        self.outcomes.repaired += bool(repairs)
        self.outcomes.well_formed += not repairs
        self.outcomes.repairs.update(repairs.keys())


def read_ranking(answer: Answer, num_passages: int) -> Ranking | None:
    """Return the ranking that an answer states, or None.

    An answer that ended at its limit and names fewer than half of the passages was cut in what stands before the
    ranking: identifiers in it are no ranking.
    """
    ranking = parse_permutation(answer.text, num_passages)
    if ranking and answer.finish_reason == CUT and 2 * ranking.repairs.get("missing", 0) > num_passages:
        return None
    return ranking


def ranking_schema() -> dict[str, Any]:
    """Return the `response_format` that binds an answer to `{"ranking": [whole numbers]}`."""
    schema = {
        "type": "object",
        "properties": {"ranking": {"type": "array", "items": {"type": "integer"}}},
        "required": ["ranking"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "ranking", "strict": True, "schema": schema}}

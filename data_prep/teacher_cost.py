"""What a teacher costs: tokens, prices, and a limit that is never passed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple


class Usage(NamedTuple):
    """Tokens of prompts and of answers."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: tuple[int, ...]) -> "Usage":  # type: ignore[override]  # a sum, not a longer tuple
        return Usage(self.prompt + other[0], self.completion + other[1])

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt - other.prompt, self.completion - other.completion)

    @property
    def total(self) -> int:
        return self.prompt + self.completion


class Prices(NamedTuple):
    """Prices in the user's currency per million tokens; None where they were not given."""

    input: float | None = None
    output: float | None = None

    def cost(self, usage: Usage) -> float | None:
        if self.input is None or self.output is None:
            return None
        return (usage.prompt * self.input + usage.completion * self.output) / 1e6


class LimitReached(Exception):
    """The next request could pass `--max-cost` or `--max-tokens`; nothing is in flight any more."""


class Budget:
    """Lets a request go out only when its worst case, on top of all that is spent and in flight, stays in the limits.

    A worst case is the longest answer allowed and the prompt's estimate, times `MARGIN` or the worst error seen so far.
    A request that does not fit waits until those in flight have shown their true cost.
    `cost` is what was paid for what is `spent` already, where that was not at these prices.
    """

    MARGIN = 1.5

    def __init__(
        self,
        prices: Prices,
        max_cost: float | None,
        max_tokens: int | None,
        spent: Usage,
        exact: bool = False,
        cost: float | None = None,
    ) -> None:
        self.prices, self.max_cost, self.max_tokens = prices, max_cost, max_tokens
        self.spent = spent
        self.cost = prices.cost(spent) if cost is None else cost
        self.in_flight: list[Usage] = []
        self.margin = 1.1 if exact else self.MARGIN  # servers add a chat template that no tokenizer's count holds
        self._changed = asyncio.Condition()

    def worst_case(self, prompt_estimate: int, answer_tokens: int) -> Usage:
        return Usage(int(prompt_estimate * self.margin) + 1, answer_tokens)

    def fits(self, usage: Usage) -> bool:
        """Tell whether `usage` on top of everything spent and in flight stays within the limits."""
        ahead = sum(self.in_flight, usage)
        if self.max_tokens is not None and (self.spent + ahead).total > self.max_tokens:
            return False
        cost = self.prices.cost(ahead)
        return self.max_cost is None or cost is None or (self.cost or 0.0) + cost <= self.max_cost

    @asynccontextmanager
    async def reserve(self, prompt_estimate: int, answer_tokens: int) -> AsyncIterator[None]:
        """Hold room for one request while the block runs; raises `LimitReached` where there never will be any."""
        async with self._changed:
            while not self.fits(held := self.worst_case(prompt_estimate, answer_tokens)):
                if not self.in_flight:
                    raise LimitReached
                await self._changed.wait()
            self.in_flight.append(held)
        try:
            yield
        finally:
            self.in_flight.remove(held)
            async with self._changed:
                self._changed.notify_all()

    def spend(self, usage: Usage, prompt_estimate: int) -> None:
        """Count what a request cost, and learn from it how far estimates err."""
        self.spent += usage
        if (cost := self.prices.cost(usage)) is not None:
            self.cost = (self.cost or 0.0) + cost
        self.margin = max(self.margin, 1.05 * usage.prompt / max(prompt_estimate, 1))

"""What a teacher job tells its user: a progress bar, a summary table, the forecast of a dry run."""

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from .teacher import Teacher, TeacherList
from .teacher_cost import Budget, Prices, Usage


class Progress:
    """A bar over windows with tokens, cost and failures; windows of failed lists count as done."""

    def __init__(self, lists: list[TeacherList], teacher: Teacher, budget: Budget) -> None:
        self.teacher, self.budget = teacher, budget
        self.failed: dict[str, int] = {}  # query id -> windows that will not be asked
        self.bar = tqdm(total=sum(item.sliding.remaining for item in lists), unit="window", dynamic_ncols=True)

    def update(self, item: TeacherList) -> None:
        """Show where the job is after something happened to this list."""
        if item.failure:
            self.failed[item.query_id] = item.sliding.remaining
        postfix: dict[str, Any] = {"tokens": f"{self.budget.spent.total:,}"}
        if self.budget.cost is not None:
            postfix["cost"] = f"{self.budget.cost:.2f}"
        self.bar.set_postfix(**postfix, failed=len(self.failed), refresh=False)
        self.bar.update(self.teacher.outcomes.answered + sum(self.failed.values()) - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def summary(
    lists: list[TeacherList], teacher: Teacher, prices: Prices, seconds: float, sent_again: Mapping[str, int]
) -> str:
    """Return the table of a job: every window of the run, earlier starts included; `sent_again` is this start's."""
    outcomes, journal = teacher.outcomes, teacher.journal
    assert journal is not None  # a summary follows a job, and a job has its journal
    failed = sum(item.failure is not None for item in lists)
    finished = sum(not item.failure and not item.sliding.remaining for item in lists)
    cut = f"{outcomes.cut:,} windows: raise --max-answer-tokens"
    rows = [
        ("lists ranked", f"{finished:,} of {len(lists):,}"),
        ("lists failed", f"{failed:,}"),
        ("windows answered", f"{outcomes.answered:,}"),
        ("  well-formed", f"{outcomes.well_formed:,}"),
        ("  repaired", f"{outcomes.repaired:,}{_kinds(outcomes.repairs)}"),
        ("windows failed", f"{outcomes.failed:,}"),
        *([("answers cut at their limit", cut)] if outcomes.cut else []),
        ("asked again (no ranking)", f"{outcomes.asked_again:,}"),
        ("sent again (server)", f"{sum(sent_again.values()):,}{_kinds(sent_again)}"),
        *usage_rows(journal.usage, journal.spent(prices)),
        ("seconds", f"{seconds:.1f}"),
    ]
    if journal.unanswered:
        note = f"{journal.unanswered:,} requests whose answer never came whole are counted as if billed"
        rows.insert(-1, ("  of them", note))
    return table(rows)


def dry_run(lists: list[TeacherList], teacher: Teacher, prices: Prices) -> str:
    """Return what is still to be asked and what it will cost, as if every answer kept the first stage's order."""
    usage, windows = Usage(), 0
    for item in lists:
        teacher.advance(item)
        if not item.failure:
            windows += item.sliding.remaining
            usage += teacher.expected_usage(item)
    how = "counted" if teacher.counter.exact else "estimated at 4 bytes a token; --tokenizer counts"
    return table(
        [
            ("windows to ask", f"{windows:,}"),
            ("windows in the journal", f"{teacher.outcomes.answered:,}"),
            *usage_rows(usage, prices.cost(usage)),
            ("tokens are", how),
            ("nothing was asked", "this was a dry run"),
        ]
    )


def usage_rows(usage: Usage, cost: float | None) -> list[tuple[str, str]]:
    shown = "unknown: give --price-input and --price-output" if cost is None else f"{cost:,.4f}"
    return [("prompt tokens", f"{usage.prompt:,}"), ("answer tokens", f"{usage.completion:,}"), ("cost", shown)]


def table(rows: list[tuple[str, str]]) -> str:
    """Return rows of a name and a value, in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _kinds(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{kind} {count:,}' for kind, count in sorted(counts.items()))})" if counts else ""

"""The journal of a teacher run: what was asked and answered, so that no window is ever paid for twice.

Lines of JSON beside the output, only ever appended, each flushed and synced before its answer is used:
`{"type": "settings", ...}` when a job begins or its settings change, `{"type": "answer", ...}` for every answer,
`{"type": "unanswered", ...}` for a request that may have been billed though its answer never came whole, and
`{"type": "batch", ...}` for what OpenAI's Batch API was given. Answers are found again by a hash of their request.
"""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from setenc_hf.errors import InputError

from .teacher_cost import Prices, Usage


class Answer(NamedTuple):
    """What came back for one request: raw text, why it ended, tokens as billed, seconds it took."""

    text: str
    finish_reason: str
    usage: Usage
    seconds: float


def journal_path(output: str | Path) -> Path:
    """Return where the journal of the run `output` lies."""
    output = Path(output)
    return output.with_name(output.name + ".journal.jsonl")


class Journal:
    """An open journal; while it is open no other process may write it (`InputError` for the second).

    The lock is the kernel's (`flock`), so a killed process leaves none behind. A last line without its end, cut when
    a process or machine died, is dropped; any other damage is an `InputError` with `file:line`.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.usage = Usage()
        self.prices = Prices()  # today's, by which what is added is priced
        self.cost = 0.0  # of the lines that were priced
        self.unpriced = Usage()  # of the others
        self.unanswered = 0
        self.batches: dict[str, dict[str, Any]] = {}
        self.collected: set[tuple[str, str]] = set()  # (name of the batch, hash of the request)
        self.cut_line = False
        self._one_at_a_time = threading.Lock()
        if read_only and not path.is_file():
            raise InputError(f"{path}: no such journal")
        if path.is_dir():
            raise InputError(f"{path}: is a directory, not a journal")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "rb" if read_only else "a+b")  # noqa: SIM115, open as long as the job
        try:
            self._lock(fcntl.LOCK_SH if read_only else fcntl.LOCK_EX)
            self._read(repair=not read_only)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def spent(self, prices: Prices) -> float | None:
        """Return what all of it cost: each line at the price of its day, lines without one at `prices`."""
        rest = prices.cost(self.unpriced)
        if rest is None and (self.unpriced.total or not self.cost):
            return None
        return self.cost + (rest or 0.0)

    def start(self, settings: dict[str, Any], accept_changes: bool) -> None:
        """Note the settings of this job; raises `InputError` where they differ from the last ones, unless accepted."""
        self.check(settings, accept_changes)
        if self.settings != settings:
            self._add({"type": "settings", "settings": settings})

    def check(self, settings: dict[str, Any], accept_changes: bool) -> None:
        """Raise `InputError` naming every setting that differs from the journal's last ones, unless accepted.

        A journal of which nothing has been asked yet goes on with any.
        """
        is_asked = bool(self.answers or self.unanswered or self.batches)
        if is_asked and self.settings != settings and not accept_changes:
            changes = [
                f"{name} was {self.settings.get(name)!r:.60}, is {settings.get(name)!r:.60}"
                for name in sorted(self.settings.keys() | settings.keys())
                if self.settings.get(name) != settings.get(name)
            ]
            raise InputError(
                f"{self.path}: this journal was begun with other settings ({'; '.join(changes)}); give them again, "
                "name another --output, or pass --accept-changes to go on with what is still the same request"
            )

    def add_answer(self, request: str, query_id: str, answer: Answer, **more: str) -> None:
        """Keep the answer to the request with this hash; on return it is on the disk."""
        row = {"type": "answer", "request": request, "query_id": query_id, "answer": answer.text}
        usage = {"prompt_tokens": answer.usage.prompt, "completion_tokens": answer.usage.completion}
        rest = {"finish_reason": answer.finish_reason, **usage, "seconds": round(answer.seconds, 3), **more}
        self._add(row | rest | self._price(answer.usage))

    def add_unanswered(self, request: str, query_id: str, usage: Usage) -> None:
        """Keep that a request was sent and its answer lost; `usage` is what it may have cost."""
        counts = {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion}
        row = {"type": "unanswered", "request": request, "query_id": query_id, **counts}
        self._add(row | self._price(usage))

    def add_batch(self, name: str, **state: Any) -> None:
        """Keep the state of a batch under our own name for it; later states replace earlier ones, key by key."""
        self._add({"type": "batch", "name": name, **state})

    def _price(self, usage: Usage) -> dict[str, float]:
        cost = self.prices.cost(usage)
        return {} if cost is None else {"cost": cost}

    def _add(self, row: dict[str, Any]) -> None:
        with self._one_at_a_time:
            self._file.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._note(row)

    def _note(self, row: dict[str, Any]) -> None:
        if row["type"] == "settings":
            self.settings = row["settings"]
        elif row["type"] == "batch":
            self.batches.setdefault(row["name"], {}).update(row)
        else:
            usage = Usage(row["prompt_tokens"], row["completion_tokens"])
            self.usage += usage
            if "cost" in row:
                self.cost += row["cost"]
            else:
                self.unpriced += usage
            if row["type"] == "answer":
                answer = Answer(row["answer"], row["finish_reason"], usage, row["seconds"])
                self.answers.setdefault(row["request"], []).append(answer)
                if "batch" in row:
                    self.collected.add((row["batch"], row["request"]))
            else:
                self.unanswered += 1

    def _lock(self, mode: int) -> None:
        try:
            fcntl.flock(self._file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is at work on this output; wait for it to end") from None

    def _read(self, repair: bool) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._lines(), start=1):
            whole += len(line)
            try:
                self._note(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{self.path}:{number}: not a line of a journal: {line[:80]!r}; repair or remove that line"
                ) from None
        if self.cut_line and repair:
            self._file.truncate(whole)

    def _lines(self) -> Iterator[bytes]:
        for line in self._file:
            if not line.endswith(b"\n"):
                self.cut_line = True
                return
            yield line

"""A teacher run through OpenAI's Batch API, at half the price and at leisure.

A window's passages are known only when the window below it is answered. So a run goes in rounds: `submit` sends the
next window of every unfinished list as one batch, `collect` puts its answers into the journal. A list of 100 with
windows of 20 and stride 10 takes 9 rounds; one window over the whole list takes one.
"""

import io
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from setenc_hf.errors import InputError

from .journal import Answer, Journal
from .llm_client import REFUSED_PROMPT, api_key, import_openai, stop_reason
from .teacher import Request
from .teacher_cost import Budget, LimitReached, Usage

MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000  # the API's limits per batch are 50,000 and 200 MB
FINISHED = ("completed", "failed", "expired", "cancelled")
OPEN = ("intended", "submitted")


class BatchTeacher:
    """Submits, watches and collects the batches noted in a journal."""

    def __init__(self, base_url: str, journal: Journal) -> None:
        self.openai = import_openai()
        self.base_url, self.journal = base_url, journal
        self.client = self.openai.OpenAI(api_key=api_key(base_url), base_url=base_url, max_retries=5)

    def submit(self, requests: list[Request], budget: Budget) -> list[str]:
        """Send these requests as one batch, or as many as the limits of a batch make necessary; return their ids.

        Requests that could pass the user's limits are kept back; raises `LimitReached` where that is all of them, and
        `InputError` while an earlier batch is out.
        """
        self._find_lost()
        if out := self.open_batches():
            raise InputError(f"{self.journal.path}: batch {out[0]['id']} is still out; --batch collect it first")
        affordable = []
        for request in {request.key: request for request in requests}.values():
            limit = request.body.get("max_tokens") or request.body["max_completion_tokens"]
            held = budget.worst_case(request.prompt_tokens, limit)
            if not budget.fits(held):
                break
            budget.in_flight.append(held)
            affordable.append(request)
        if not affordable:
            raise LimitReached
        return [self._submit_one(lines) for lines in split(affordable)]

    def status(self) -> list[str]:
        """Return a line for each batch that is out: id, state, requests completed, failed and in all."""
        self._find_lost()
        lines = []
        for state in self.open_batches():
            batch = self._retrieve(state["id"])
            counts = batch.request_counts
            done = f"{counts.completed} of {counts.total} answered, {counts.failed} failed" if counts else "no counts"
            lines.append(f"batch {batch.id}: {batch.status}, {done}")
        return lines

    def collect(self) -> list[str]:
        """Put the answers of every finished batch into the journal; return a line for each batch that was out."""
        self._find_lost()
        return [self._collect_one(state) for state in self.open_batches()]

    def open_batches(self) -> list[dict[str, Any]]:
        return [state for state in self.journal.batches.values() if state["status"] in OPEN]

    def _submit_one(self, lines: list[bytes]) -> str:
        # noted before it is sent: were we killed in between, the batch would be found again by this name
        name = f"setenc-{uuid.uuid4().hex}"
        self.journal.add_batch(name, status="intended", requests=len(lines))
        with self._speaking():
            file = self.client.files.create(file=(f"{name}.jsonl", io.BytesIO(b"".join(lines))), purpose="batch")
            batch = self.client.with_options(max_retries=0).batches.create(  # a second try could make a second batch
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"name": name},
            )
        self.journal.add_batch(name, status="submitted", id=batch.id)
        return batch.id

    def _find_lost(self) -> None:
        """Settle batches that were about to be sent when a process ended: find them on the server, or drop them."""
        lost = {name for name, state in self.journal.batches.items() if state["status"] == "intended"}
        if not lost:
            return
        with self._speaking():
            for batch in self.client.batches.list(limit=100):
                if (name := (batch.metadata or {}).get("name")) in lost:
                    self.journal.add_batch(name, status="submitted", id=batch.id)
                    lost.discard(name)
                if not lost:
                    break
        for name in lost:
            self.journal.add_batch(name, status="never sent")

    def _collect_one(self, state: dict[str, Any]) -> str:
        batch = self._retrieve(state["id"])
        if batch.status not in FINISHED:
            return f"batch {batch.id}: {batch.status}, not finished yet"
        answered, errors = 0, []
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            with self._speaking():
                content = self.client.files.content(file_id).text
            for line in filter(None, content.split("\n")):
                row = json.loads(line)
                answer = read_answer(row)
                if isinstance(answer, str):
                    errors.append(answer)
                    continue
                answered += 1
                if (state["name"], row["custom_id"]) not in self.journal.collected:  # of a collect that was killed
                    self.journal.add_answer(row["custom_id"], "", answer, batch=state["name"])
        self.journal.add_batch(state["name"], status="collected")
        errors += [error.message or "" for error in (batch.errors.data or [])] if batch.errors else []
        failed = f"; {len(errors)} errors, the first: {' '.join(errors[0].split())[:200]}" if errors else ""
        return f"batch {batch.id}: {batch.status}, {answered} of {state['requests']} answers collected{failed}"

    def _retrieve(self, batch_id: str) -> Any:
        with self._speaking():
            return self.client.batches.retrieve(batch_id)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except self.openai.APIStatusError as error:
            raise InputError(stop_reason(error.status_code, error, self.base_url)) from None
        except self.openai.APIConnectionError:
            raise InputError(f"{self.base_url} cannot be reached; run the same command again to go on") from None


def split(requests: list[Request]) -> Iterator[list[bytes]]:
    """Yield the lines of the requests, as many at a time as one batch may hold."""
    lines: list[bytes] = []
    size = 0
    for request in requests:
        row = {"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions", "body": request.body}
        line = json.dumps(row).encode() + b"\n"
        if lines and (len(lines) == MAX_REQUESTS or size + len(line) > MAX_BYTES):
            yield lines
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield lines


def read_answer(row: dict[str, Any]) -> Answer | str:
    """Return the answer in a line of a batch's output, or what went wrong with that request."""
    response = row.get("response") or {}
    body = response.get("body") or {}
    problem = row.get("error") or body.get("error") or {}
    if response.get("status_code") == 200 and body.get("choices"):
        choice, usage = body["choices"][0], body.get("usage") or {}
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        billed = Usage(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
        return Answer(text, choice.get("finish_reason") or "", billed, 0.0)
    if problem.get("code") in REFUSED_PROMPT:
        return Answer("", "content_filter", Usage(), 0.0)
    return f"{response.get('status_code', '')} {problem.get('message') or 'no answer and no reason given'}"

"""Ask a chat model over the OpenAI API or any server that speaks it: what to try again, and what ends the job."""

import asyncio
import ipaddress
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from setenc_hf.errors import InputError

from .journal import Answer, Journal
from .teacher import Request
from .teacher_cost import Budget, Usage
from .tokens import TokenCounter

OPENAI = "https://api.openai.com/v1"
CONNECT_SECONDS = 10.0  # for a connection alone: nothing has been sent before there is one
LONGEST_BACKOFF = 16.0  # seconds between two requests where the server names no time
LONGEST_WAIT = 600.0  # seconds; a server that says "come back tomorrow" should end the job, not hold it
T = TypeVar("T")
REFUSED_PROMPT = ("content_filter", "content_policy_violation")


class Unanswered(Exception):
    """Every attempt at this request failed for a reason that may pass."""


def resolve_base_url(base_url: str | None) -> str:
    """Return the server's address; raises `InputError` on one with a password in it or without a scheme."""
    url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        is_address = False
    if not is_address:
        raise InputError(f"--base-url is an address such as http://localhost:8000/v1, got {url!r}")
    if "@" in parts.netloc or parts.query:
        raise InputError("--base-url: leave user, password and key out of it; the key is read from OPENAI_API_KEY")
    return url


def is_openai(base_url: str) -> bool:
    """Tell whether this is OpenAI's own server, in whatever region."""
    host = urlsplit(base_url).hostname or ""
    return f".{host}".endswith(f".{urlsplit(OPENAI).hostname}")


def api_key(base_url: str) -> str:
    """Return the key from the environment; a server in the own network works without one."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not _is_own_network(base_url):
        raise InputError(f"{base_url} needs a key: set the environment variable OPENAI_API_KEY")
    return key or "none"


def _is_own_network(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost"))


def import_openai() -> Any:
    """Return the `openai` package, which only the teacher needs."""
    try:
        import openai
    except ImportError as error:
        raise InputError("the LLM teacher needs the OpenAI client: pip install 'setenc_hf[teacher]'") from error
    return openai


class LlmClient:
    """Asks one request at a time, any number at once; `retries` counts by cause what had to be sent again."""

    def __init__(
        self,
        base_url: str,
        journal: Journal,
        budget: Budget,
        counter: TokenCounter,
        timeout: float = 120.0,
        max_retries: int = 8,
    ) -> None:
        self.openai = import_openai()
        self.base_url, self.journal, self.budget, self.counter = base_url, journal, budget, counter
        self.timeout, self.max_retries = timeout, max_retries
        self.retries: Counter[str] = Counter()
        # its own retries are off: ours count them, keep the budget and stop where a retry is of no use
        patience = self.openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        self.client = self.openai.AsyncOpenAI(
            api_key=api_key(base_url), base_url=base_url, max_retries=0, timeout=patience
        )

    async def __aenter__(self) -> "LlmClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def ask(self, request: Request) -> None:
        """Ask until there is an answer, and journal it. Raises `Unanswered`, `LimitReached`, `InputError` (no use).

        Cancelled, because another request ended the job or the user did, it first waits for the answer to what it has
        sent, which is paid for, and journals it.
        """
        answer_tokens = request.body.get("max_tokens") or request.body["max_completion_tokens"]
        for attempt in range(self.max_retries + 1):
            async with self.budget.reserve(request.prompt_tokens, answer_tokens):
                retry = await _to_its_end(self._exchange(request, attempt))
            if retry is None:
                return
            cause, wait = retry
            if attempt < self.max_retries:
                self.retries[cause] += 1
                await asyncio.sleep(wait)
        raise Unanswered(f"no answer in {self.max_retries + 1} requests, the last: {cause}")

    async def _exchange(self, request: Request, attempt: int) -> tuple[str, float] | None:
        """Send once and journal what comes; return why to send again and after how many seconds, None if answered."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):
                # not chat.completions.create: it takes 10 ms of CPU to re-check the 43 messages of a window
                completion = await self.client.post(
                    "/chat/completions", body=request.body, cast_to=self.openai.types.chat.ChatCompletion
                )
            answer = self._answer(completion, request, time.monotonic() - started)
        except (self.openai.APIError, TimeoutError, _NoAnswer, ValueError) as error:
            if (refused := self._refused_prompt(error, request)) is None:
                cause, wait = self._judge(error, attempt)
                if cause in ("time-out", "cut"):  # the server may have answered, and may bill it
                    await self._keep(self.journal.add_unanswered, request, request.expected)
                    self.budget.spend(request.expected, request.prompt_tokens)
                return cause, wait
            answer = refused
        await self._keep(self.journal.add_answer, request, answer)
        self.budget.spend(answer.usage, request.prompt_tokens)
        return None

    async def _keep(self, add: Callable[[str, str, Any], None], request: Request, what: Any) -> None:
        """Journal in a thread: a sync takes milliseconds, in which other answers come in."""
        await asyncio.to_thread(add, request.key, request.query_id, what)

    def _answer(self, completion: Any, request: Request, seconds: float) -> Answer:
        choices = getattr(completion, "choices", None)
        if not choices:  # some gateways report an upstream's error with status 200
            raise _NoAnswer
        message, usage = choices[0].message, completion.usage
        text = message.content or getattr(message, "refusal", None) or ""
        counted = Usage(request.prompt_tokens, self.counter.count(text))  # a server that reports no usage is estimated
        billed = Usage(usage.prompt_tokens, usage.completion_tokens) if usage else counted
        return Answer(text, choices[0].finish_reason or "", billed, seconds)

    def _refused_prompt(self, error: Exception, request: Request) -> Answer | None:
        """A provider's filter against one prompt is an answer without a ranking, not the end of the job."""
        if getattr(error, "status_code", None) == 400 and getattr(error, "code", None) in REFUSED_PROMPT:
            return Answer("", "content_filter", Usage(request.prompt_tokens, 0), 0.0)
        return None

    def _judge(self, error: Exception, attempt: int) -> tuple[str, float]:
        """Return why to ask again and after how many seconds; raises `InputError` where asking again is of no use."""
        backoff = min(LONGEST_BACKOFF, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
        if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):
            return "no connection", backoff
        if isinstance(error, TimeoutError | self.openai.APITimeoutError):
            return "time-out", backoff
        if isinstance(error, self.openai.APIConnectionError):
            return "cut", backoff
        status = getattr(error, "status_code", None)
        if not isinstance(status, int) or status < 400:
            return "cut", backoff  # a body that is no answer
        if status in (408, 409, 429) or status >= 500:
            if getattr(error, "code", None) == "insufficient_quota":
                raise InputError(f"429: the account at {self.base_url} has no credit left; nothing more was asked")
            wait = retry_after(error.response.headers)  # type: ignore[attr-defined]
            if wait > LONGEST_WAIT:
                raise InputError(f"{status}: {self.base_url} asks to wait {wait:.0f} s; run the same command then")
            return str(status), wait * random.uniform(1.0, 1.1) if wait else backoff
        raise InputError(stop_reason(status, error, self.base_url))


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancelled meanwhile, await it all the same before passing that on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # what ended the job is told already
        raise


class _NoAnswer(Exception):
    """Status 200 without an answer in it."""


def retry_after(headers: Any) -> float:
    """Return the seconds a server asks to wait: `Retry-After-Ms`, or `Retry-After` in seconds or as a date; else 0."""
    try:
        if "retry-after-ms" in headers:
            return max(float(headers["retry-after-ms"]) / 1000, 0.0)
        value = headers.get("retry-after", "0")
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def stop_reason(status: int, error: Exception, base_url: str) -> str:
    """Return the one line that ends a job. A server's own words may quote the key, so it is taken out."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if status in (401, 403):
        missing = "" if key else " (it is not set)"
        what = "refuses the key in OPENAI_API_KEY" if status == 401 else "does not allow this model or use to the key"
        return f"{status}: {base_url} {what}{missing}; the job was stopped"
    body = getattr(error, "body", None)
    words = body.get("message") if isinstance(body, dict) else None
    detail = " ".join(str(words or error).split())
    if key:
        detail = detail.replace(key, "[key]")
    hint = "; is --model known to this server?" if status == 404 else ""
    return f"{status}: {base_url} says: {detail[:300]}{hint} (the job was stopped; what was answered is in the journal)"

"""An LLM re-ranks a run listwise: the teacher run.

RankGPT's sliding window (Sun et al. 2023, arXiv 2304.09542) through the OpenAI API or any server that speaks it. The
key is read from OPENAI_API_KEY. Every answer is journaled before it is used: after a crash, a kill or a limit, the
same command goes on where it was.

Exit status: 0 every list is ranked; 2 bad input, or the server refuses the job; 3 the run is written without the lists
that failed, which OUTPUT.failed.tsv names; 4 stopped before a limit was passed.
"""

import argparse
import asyncio
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from setenc_hf.collection import open_collection
from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_file
from setenc_hf.trec import read_qrels, write_run

from .ask_lists import ask_lists
from .journal import Journal, journal_path
from .llm_client import LlmClient, is_openai, resolve_base_url
from .teacher import Teacher, TeacherList
from .teacher_arguments import answer_tokens, build_parser, build_prompt, check_arguments, journaled_settings
from .teacher_batch import OPEN, BatchTeacher
from .teacher_cost import Budget, LimitReached, Prices
from .teacher_lists import read_lists_to_rank
from .teacher_summary import Progress, dry_run, summary
from .tokens import token_counter
from .windows import SlidingWindow

SOME_FAILED, LIMIT_REACHED = 3, 4


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser(__doc__ or "").parse_args(argv)
    check_arguments(args)
    teacher, lists = read_job(args)
    output = journal_path(args.output)
    if args.dry_run:
        if output.exists():
            teacher.journal = Journal(output, read_only=True)
        print(dry_run(lists, teacher, prices(args)))
        return
    own = args.replay is None or not args.replay
    with Journal(output if own else Path(args.replay), read_only=args.replay is not None) as journal:
        teacher.journal = journal
        journal.prices = prices(args)
        settings = journaled_settings(args, teacher.prompt) | {"texts": teacher.digest(lists)}
        if args.replay is not None:
            journal.check(settings, args.accept_changes)
            replay(args, teacher, lists)
            return
        journal.start(settings, args.accept_changes)
        if args.batch:
            batch(args, teacher, lists)
        else:
            ask(args, teacher, lists)


def read_job(args: argparse.Namespace) -> tuple[Teacher, list[TeacherList]]:
    """Return the teacher and the lists that the arguments describe, and say what was read and left out."""
    prompt, counter = build_prompt(args), token_counter(args.tokenizer)
    collection = open_collection(args.collection)
    relevant = None
    if args.add_relevant:
        relevant = list(read_qrels(args.qrels)) if args.qrels else collection.qrels()
    ranked = read_lists_to_rank(args.run, collection, args.depth, relevant)
    for line in ranked.report():
        print(line)
    teacher = Teacher(
        model=args.model,
        prompt=prompt,
        counter=counter,
        texts=ranked.texts,
        journal=None,
        temperature=args.temperature,
        answer_tokens=answer_tokens(args),
        attempts=args.attempts,
        # OpenAI's newer models refuse the old name, most other servers know no other
        limit_name="max_completion_tokens" if is_openai(resolve_base_url(args.base_url)) else "max_tokens",
    )
    lists = [
        TeacherList(
            query_id, ranked.queries[query_id], SlidingWindow(doc_ids, args.window_size, args.stride, args.passes)
        )
        for query_id, doc_ids in ranked.lists.items()
    ]
    return teacher, lists


def ask(args: argparse.Namespace, teacher: Teacher, lists: list[TeacherList]) -> None:
    """Ask the server about every window that is not journaled, then write the run."""
    assert teacher.journal is not None
    started = time.monotonic()
    if out := [state for state in teacher.journal.batches.values() if state["status"] in OPEN]:
        if "id" not in out[0]:
            raise InputError("a batch may have been sent when this job ended last; --batch status finds that out")
        raise InputError(f"batch {out[0]['id']} is still out; --batch collect it, or its windows are paid for twice")
    budget = build_budget(args, teacher)
    client = LlmClient(
        resolve_base_url(args.base_url), teacher.journal, budget, teacher.counter, args.timeout, args.max_retries
    )
    progress = Progress(lists, teacher, budget)

    async def job() -> None:
        with cancelled_by_sigterm():
            async with client:
                await ask_lists(lists, teacher, client, args.concurrency, progress.update)

    try:
        asyncio.run(job())
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except LimitReached:
        progress.close()
        print(summary(lists, teacher, prices(args), time.monotonic() - started, client.retries))
        stop_at_limit(args)
    finally:
        progress.close()
    finish(args, teacher, lists, started, client.retries)


@contextmanager
def cancelled_by_sigterm() -> Iterator[None]:
    """Have SIGTERM cancel the task as Ctrl-C does: what is in flight is journaled first. A second changes nothing.

    An exception out of a signal's handler would end the loop, and with it every request that is paid for.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    before, is_stopping = signal.getsignal(signal.SIGTERM), False

    def stop() -> None:
        nonlocal is_stopping
        if not is_stopping and task is not None:
            is_stopping = True
            task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)


def replay(args: argparse.Namespace, teacher: Teacher, lists: list[TeacherList]) -> None:
    """Make the run from the journal alone; a list with a window that is not in it fails."""
    started = time.monotonic()
    for item in lists:
        if teacher.advance(item):
            item.failure = f"the journal lacks {item.sliding.remaining} of its windows"
    finish(args, teacher, lists, started, {})


def batch(args: argparse.Namespace, teacher: Teacher, lists: list[TeacherList]) -> None:
    """Submit a round, show how it is doing, or collect it; the run is written when no window is left."""
    assert teacher.journal is not None
    started = time.monotonic()
    batches = BatchTeacher(resolve_base_url(args.base_url), teacher.journal)
    if args.batch == "status":
        print("\n".join(batches.status() or ["no batch is out"]))
        return
    if args.batch == "collect":
        print("\n".join(batches.collect() or ["no batch is out"]))
    requests = [request for item in lists if (request := teacher.advance(item))]
    if not requests:
        finish(args, teacher, lists, started, {})
    elif args.batch == "submit":
        try:
            ids = batches.submit(requests, build_budget(args, teacher))
        except LimitReached:
            stop_at_limit(args)
        print(f"submitted the next window of each unfinished list: {' '.join(ids)}; --batch status, then collect")
    elif not batches.open_batches():
        left = sum(item.sliding.remaining for item in lists if not item.failure)
        print(f"{left:,} windows are left to ask; --batch submit sends the next {len(requests):,}")


def finish(
    args: argparse.Namespace, teacher: Teacher, lists: list[TeacherList], started: float, retries: dict[str, int]
) -> None:
    """Write the run of the lists the teacher ordered and the names of those it didn't; ends with status 3 on these."""
    print(summary(lists, teacher, prices(args), time.monotonic() - started, retries))
    failed = [item for item in lists if item.failure]
    failures = Path(f"{args.output}.failed.tsv")
    if failed:
        with atomic_file(failures) as file:
            file.writelines(f"{item.query_id}\t{item.failure}\n" for item in failed)
        print(f"{len(failed):,} lists failed and are not in the run: {failures} says why", file=sys.stderr)
    else:
        failures.unlink(missing_ok=True)
    if len(failed) < len(lists):
        orders = ((item.query_id, item.sliding.doc_ids) for item in lists if not item.failure)
        scored = (
            (query_id, [(doc_id, len(ids) - place) for place, doc_id in enumerate(ids)]) for query_id, ids in orders
        )
        count = write_run(args.output, scored, "-".join((args.tag or args.model).split()))
        print(f"wrote {args.output}: {len(lists) - len(failed):,} lists, {count:,} lines")
    if failed:
        sys.exit(SOME_FAILED)


def build_budget(args: argparse.Namespace, teacher: Teacher) -> Budget:
    assert teacher.journal is not None
    journal, exact = teacher.journal, teacher.counter.exact
    cost = journal.spent(prices(args))
    return Budget(prices(args), args.max_cost, args.max_tokens, journal.usage, exact, cost)


def prices(args: argparse.Namespace) -> Prices:
    return Prices(args.price_input, args.price_output)


def stop_at_limit(args: argparse.Namespace) -> None:
    limit = (
        "--max-tokens"
        if args.max_cost is None
        else "--max-cost"
        if args.max_tokens is None
        else "--max-cost or --max-tokens"
    )
    print(
        f"stopped before {limit} could be passed; {args.output} was not written. Run the same command with a higher "
        "limit to go on (no answered window is asked again), or with --replay to write the lists that are finished",
        file=sys.stderr,
    )
    sys.exit(LIMIT_REACHED)


if __name__ == "__main__":
    run_command(main)

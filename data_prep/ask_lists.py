"""Ask a server about many lists at once: any number of lists in progress, each list's windows in order."""

import asyncio
from collections.abc import Callable, Iterable, Iterator

from setenc_hf.errors import InputError

from .llm_client import LlmClient, Unanswered
from .teacher import Teacher, TeacherList
from .teacher_cost import LimitReached

LISTS_PER_SLOT = 4  # lists in progress for every request in flight: enough that the last ones end together
CONNECTION_INTERVAL = 0.01  # seconds; a small server drops a burst of new connections, and TCP retries after 1 s
UNRANKED_AT_FIRST = 10  # lists without a ranking and none with one: the model or the limit on answers is wrong
GIVE_UP_AFTER = 3  # windows in a row that no attempt could get answered: the server is gone, not the window


async def ask_lists(
    lists: Iterable[TeacherList],
    teacher: Teacher,
    client: LlmClient,
    concurrency: int,
    on_answer: Callable[[TeacherList], None],
) -> None:
    """Take every list through its windows with `concurrency` requests in flight; a list's own never overlap.

    A window without any answer fails its list. Raises `InputError` where the server refuses the job or is gone or gives
    no ranking from the first, and `LimitReached` once nothing is in flight and the next request could pass a limit.
    Whatever ends the job, what is in flight is awaited and journaled first.
    """
    slots = asyncio.Semaphore(concurrency)  # first come, first served: lists in progress advance evenly
    asking: dict[str, asyncio.Event] = {}  # two queries of the same text and list ask the same: pay once
    waiting = iter(lists)
    lost_in_a_row = unranked = 0
    stopped = False

    async def worker(number: int) -> None:
        nonlocal lost_in_a_row, unranked, stopped
        await asyncio.sleep(min(number, concurrency) * CONNECTION_INTERVAL)
        for item in waiting:
            is_answered = False  # now, and not by the journal
            while request := teacher.advance(item):
                if request.key in asking:
                    await asking[request.key].wait()
                    continue
                asking[request.key] = asyncio.Event()
                try:
                    async with slots:
                        if stopped:  # the group has not cancelled this worker yet
                            return
                        await client.ask(request)
                    lost_in_a_row = 0
                    is_answered = True
                except InputError:
                    stopped = True
                    raise
                except Unanswered as error:
                    is_answered = False
                    item.failure = str(error)
                    lost_in_a_row += 1
                    if lost_in_a_row >= GIVE_UP_AFTER:
                        raise InputError(
                            f"{client.base_url}: {GIVE_UP_AFTER} windows in a row got {error}; the job was stopped. "
                            "Run the same command again to go on: what was answered is in the journal"
                        ) from None
                finally:
                    asking.pop(request.key).set()
                on_answer(item)
            on_answer(item)
            unranked += is_answered and item.failure is not None
            if unranked >= UNRANKED_AT_FIRST and not teacher.outcomes.answered:
                raise InputError(
                    f"the first {unranked} lists got {item.failure}; the job was stopped. What came is in the journal"
                )

    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(concurrency * LISTS_PER_SLOT):
                tasks.create_task(worker(number))
    except BaseExceptionGroup as group:
        raise _first(group, InputError, LimitReached, BaseException) from None


def _first(group: BaseExceptionGroup, *kinds: type[BaseException]) -> BaseException:
    """Return the exception that says most: by kind in this order."""
    leaves = list(_leaves(group))
    return next(error for kind in kinds for error in leaves if isinstance(error, kind))


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error

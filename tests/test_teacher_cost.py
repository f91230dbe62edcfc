"""The limit of a teacher job: what is in flight counts with its worst case."""

import asyncio

import pytest

from data_prep.teacher_cost import Budget, LimitReached, Prices, Usage


def test_a_request_in_flight_holds_its_room():
    budget = Budget(Prices(1.0, 2.0), max_cost=None, max_tokens=1000, spent=Usage(100, 100))
    budget.in_flight.append(Usage(300, 100))
    assert budget.fits(Usage(300, 100))
    assert not budget.fits(Usage(301, 100))


def test_a_request_waits_for_those_in_flight_and_stops_only_when_nothing_is():
    async def job():
        budget = Budget(Prices(1e6, 1e6), max_cost=200, max_tokens=None, spent=Usage())
        order = []

        async def ask(name):
            async with budget.reserve(prompt_estimate=60, answer_tokens=30):  # at worst 91 + 30
                order.append(f"{name} out")
                await asyncio.sleep(0)
                budget.spend(Usage(60, 10), prompt_estimate=60)
                order.append(f"{name} in")

        await asyncio.gather(ask("a"), ask("b"))
        assert order == ["a out", "a in", "b out", "b in"]
        with pytest.raises(LimitReached):
            await ask("c")
        assert budget.spent == Usage(120, 20)

    asyncio.run(job())

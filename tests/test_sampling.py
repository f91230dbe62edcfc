"""Which passages of a list training sees."""

import numpy as np
import pytest

from setenc_hf.sampling import STRATEGIES, generator

RANKS = np.array([3, 1, 2, 5, 4, 0, 0])  # the last two were added from the judgements
LABELS = np.array([0, 0, 1, 0, 0, 2, 0], dtype=np.float32)


def draw(name, size, epoch=0, query_id="q", seed=0):
    return STRATEGIES[name](generator(seed, epoch, query_id), RANKS, LABELS, size).tolist()


@pytest.fixture(params=list(STRATEGIES))
def name(request):
    return request.param


def test_a_draw_depends_on_seed_epoch_and_query_alone(name):
    assert draw(name, 4, epoch=3) == draw(name, 4, epoch=3)
    if name != "top":
        many = {
            tuple(draw(name, 4, epoch, query_id, seed)) for epoch in range(9) for query_id in "ab" for seed in (0, 1)
        }
        assert len(many) > 9


def test_a_passage_is_drawn_once_and_short_lists_are_taken_whole(name):
    for size in (2, 3, 7, 50):
        places = draw(name, size)
        assert len(set(places)) == len(places) <= size
    if name != "single_relevant":
        assert sorted(draw(name, 50)) == list(range(7))


def test_top_follows_the_run_and_takes_added_passages_last():
    assert draw("top", 3) == [1, 2, 0]
    assert draw("top", 7) == [1, 2, 0, 4, 3, 5, 6]


def test_single_relevant_has_one_relevant_passage():
    places = [draw("single_relevant", 4, epoch) for epoch in range(40)]
    assert all((LABELS[drawn] > 0).tolist() == [True, False, False, False] for drawn in places)
    assert {drawn[0] for drawn in places} == {2, 5}
    assert {place for drawn in places for place in drawn[1:]} == {0, 1, 3, 4, 6}


def test_top_and_random_keeps_the_top_half():
    places = [draw("top_and_random", 4, epoch) for epoch in range(40)]
    assert all(drawn[:2] == [1, 2] for drawn in places)
    assert {place for drawn in places for place in drawn[2:]} == {0, 3, 4, 5, 6}


def test_random_draws_all_alike_and_log_random_prefers_the_top():
    counts = {name: np.zeros(7) for name in ("random", "log_random")}
    for name, count in counts.items():
        for epoch in range(4000):
            count[draw(name, 1, epoch)] += 1
    assert np.abs(counts["random"] / 4000 - 1 / 7).max() < 0.025
    weights = 1 / np.log2(1 + np.arange(1, 8))
    expected = (weights / weights.sum())[np.argsort([1, 2, 0, 4, 3, 5, 6])]
    assert np.abs(counts["log_random"] / 4000 - expected).max() < 0.025

"""RankGPT's windows: every passage is seen, the best can climb from the bottom to the top, nothing is lost."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.windows import SlidingWindow, window_starts

SIZES = st.integers(2, 30).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


@pytest.mark.parametrize(
    ("num_passages", "starts"),
    [
        (0, []),
        (1, []),
        (7, [0]),
        (20, [0]),
        (25, [5, 0]),
        (95, [75, 65, 55, 45, 35, 25, 15, 5, 0]),
        (100, [80, 70, 60, 50, 40, 30, 20, 10, 0]),
    ],
)
def test_starts_with_the_field_s_settings(num_passages, starts):
    assert window_starts(num_passages, 20, 10) == starts


@given(st.integers(2, 300), SIZES)
def test_windows_cover_every_list(num_passages, sizes):
    size, stride = sizes
    starts = window_starts(num_passages, size, stride)
    assert starts[-1] == 0
    assert {place for start in starts for place in range(start, min(start + size, num_passages))} == set(
        range(num_passages)
    )
    assert starts == sorted(starts, reverse=True)
    assert len(set(starts)) == len(starts)
    assert all(below - above <= stride for below, above in pairwise(starts))


@given(st.integers(0, 120), SIZES, st.integers(1, 3), st.randoms(use_true_random=False))
def test_whatever_the_answers_the_list_stays_a_permutation(num_passages, sizes, passes, draw):
    doc_ids = [f"d{number}" for number in range(num_passages)]
    sliding = SlidingWindow(list(doc_ids), *sizes, passes)
    asked = 0
    while window := sliding.window:
        assert 2 <= len(window) <= sizes[0]
        order = list(range(len(window)))
        draw.shuffle(order)
        sliding.apply(order)
        asked += 1
    assert sorted(sliding.doc_ids) == sorted(doc_ids)
    assert asked == passes * len(window_starts(num_passages, *sizes))


@given(st.integers(2, 80), st.integers(2, 20))
def test_the_best_at_the_bottom_reaches_the_top_in_one_pass(num_passages, size):
    sliding = SlidingWindow([str(number) for number in range(num_passages)], size, size - 1)
    while window := sliding.window:
        sliding.apply(sorted(range(len(window)), key=lambda place: -int(window[place])))
    assert sliding.doc_ids[0] == str(num_passages - 1)


def test_passes_enough_sort_the_whole_list():
    sliding = SlidingWindow([str(number) for number in range(50)], 20, 10, passes=5)
    while window := sliding.window:
        sliding.apply(sorted(range(len(window)), key=lambda place: -int(window[place])))
    assert sliding.doc_ids == [str(number) for number in reversed(range(50))]


def test_what_is_no_permutation_is_refused():
    sliding = SlidingWindow(["a", "b", "c"], 3, 1)
    with pytest.raises(ValueError, match="not a permutation of 3"):
        sliding.apply([0, 0, 1])
    with pytest.raises(ValueError, match="`stride` must lie between"):
        window_starts(5, 2, 3)

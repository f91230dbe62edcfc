"""RankGPT's sliding window (Sun et al. 2023, arXiv 2304.09542): which passages a teacher sees together, and when."""

from collections.abc import Sequence
from dataclasses import dataclass, field


def window_starts(num_passages: int, window_size: int, stride: int) -> list[int]:
    """Return where the windows begin (ranks from 0), bottom of the list first; the last one begins at 0.

    Every passage is in a window and every window overlaps the next one up whatever the length, as `stride` may not
    exceed `window_size`. A list that fits one window has one; a list of fewer than two passages has an order already
    and has none.
    """
    if not 1 <= stride <= window_size:
        raise ValueError(f"`stride` must lie between 1 and `window_size` ({window_size}), got {stride}")
    if num_passages < 2:
        return []
    return [*range(max(num_passages - window_size, 0), 0, -stride), 0]


@dataclass
class SlidingWindow:
    """One list on its way through the windows: `window` is what to ask about next, `apply` takes the answer."""

    doc_ids: list[str]  # the list in its present order
    window_size: int
    stride: int
    passes: int = 1
    _starts: list[int] = field(init=False)
    _done: int = 0

    def __post_init__(self) -> None:
        self._starts = window_starts(len(self.doc_ids), self.window_size, self.stride) * self.passes

    @property
    def remaining(self) -> int:
        """How many windows are still to be answered."""
        return len(self._starts) - self._done

    @property
    def window(self) -> list[str]:
        """The ids of the next window, in present order; empty when every window has been answered."""
        if not self.remaining:
            return []
        start = self._starts[self._done]
        return self.doc_ids[start : start + self.window_size]

    def apply(self, permutation: Sequence[int]) -> None:
        """Re-order the next window: its new n-th passage is the one at place `permutation[n]` (from 0) of it."""
        window = self.window
        if sorted(permutation) != list(range(len(window))):
            raise ValueError(f"not a permutation of {len(window)} passages: {list(permutation)}")
        start = self._starts[self._done]
        self.doc_ids[start : start + len(window)] = [window[place] for place in permutation]
        self._done += 1

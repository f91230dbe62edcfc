"""How a training goes: what the bar shows, what the log keeps, and a picture of both.

The log has, beside `Trainer`'s loss, learning rate and gradient norm, over the steps since the last entry and over all
processes (gradient norm aside, which is the first process's after averaging):

    pairs_ordered           share of pairs of different labels that the scores order as the labels do; equal scores
                            count half
    tokens_per_passage      mean, special tokens included
    longest_passage         tokens of the longest passage
    passages_per_list       mean
    lists_per_second        without the time of evaluating and saving
    passages_per_second
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from .files import partial_path
from .loss_base import ordered_pairs
from .samples import IGNORE_LABEL

logger = logging.getLogger(__name__)
SHOWN = {"loss": "loss", "learning_rate": "lr", "lists_per_second": "lists/s", "passages_per_second": "passages/s"}


class TrainingClock(TrainerCallback, ExportableState):
    """Seconds of a training; checkpoints keep them, so that a resumed one goes on counting.

    Args:
        seconds: of the parts before.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.before = seconds
        self.started: float | None = None
        self.ended: float | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in transformers' form."""
        return {"args": {"seconds": self.now()}, "attributes": {}}

    def now(self) -> float:
        """Return the seconds up to now."""
        return self.before + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = self.now()


class TrainingRecord(TrainerCallback):
    """Adds up, step by step and on the device, what the log shows; nothing waits for the device between log entries."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was added up and start the clock."""
        self.counts = [0, 0, 0]  # lists, passages, tokens: known from shapes
        self.pairs: Tensor | None = None  # int64 [2]
        self.longest: Tensor | None = None
        self.started = self.step_ended = time.perf_counter()

    def add(self, batch: dict[str, Tensor], scores: Tensor, labels: Tensor) -> None:
        """Take in a batch of this process with its scores and labels, both [queries, longest list]."""
        for place, name in enumerate(("num_passages", "passage_lengths", "input_ids")):
            self.counts[place] += batch[name].numel()
        with torch.no_grad():
            pairs = pairs_ordered(scores.detach(), labels)
            longest = batch["passage_lengths"].max()
            self.pairs = pairs if self.pairs is None else self.pairs + pairs
            self.longest = longest if self.longest is None else torch.maximum(self.longest, longest)

    def read(self, accelerator: Any) -> dict[str, float]:
        """Return the figures since the last call, over all processes, each of which must call; start anew."""
        if self.pairs is None or self.longest is None:
            return {}
        seconds = time.perf_counter() - self.started
        sums = torch.cat([torch.tensor(self.counts, device=self.pairs.device), self.pairs])
        longest = self.longest
        if accelerator.num_processes > 1:
            gathered = accelerator.gather(torch.cat([sums, longest[None]])[None])  # [processes, 6]
            sums, longest = gathered[:, :-1].sum(0), gathered[:, -1].max()
        lists, passages, tokens, halves_right, pairs = sums.tolist()
        self.restart()
        return {
            "pairs_ordered": halves_right / 2 / max(pairs, 1),
            "tokens_per_passage": tokens / passages,
            "longest_passage": longest.item(),
            "passages_per_list": passages / lists,
            "lists_per_second": lists / seconds,
            "passages_per_second": passages / seconds,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restart()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_ended = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._skip()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._skip()

    def _skip(self) -> None:
        """Take the time since the step (or what was skipped last) out of the clock."""
        now = time.perf_counter()
        self.started += now - max(self.step_ended, self.started)
        self.step_ended = now


def pairs_ordered(scores: Tensor, labels: Tensor) -> Tensor:
    """Return twice how many pairs the scores order as the labels do, and how many there are, int64 [2], on the device.

    Twice, so that equal scores can count half.
    """
    pairs = ordered_pairs(labels, labels.ne(IGNORE_LABEL))
    first, second = scores[:, :, None], scores[:, None, :]
    halves = 2 * (first > second).long() + (first == second).long()
    return torch.stack([(halves * pairs).sum(), pairs.sum()])


class TrainingBar(ProgressCallback):
    """A bar that shows the newest log entry of the training instead of printing each above itself."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        shown = {name: f"{logs[key]:.3g}" for key, name in SHOWN.items() if key in logs}
        if shown:
            self.training_bar.set_postfix(shown)
        elif any(key.startswith("eval_") for key in logs):
            values = {key: f"{value:.4f}" for key, value in logs.items() if isinstance(value, float) and key != "epoch"}
            self.training_bar.write(f"step {state.global_step}: {'  '.join(f'{k} {v}' for k, v in values.items())}")


class CurvesCallback(TrainerCallback):
    """Draws `curves.png` into the output folder, at every save, at the end and after an evaluation behind it.

    Without matplotlib it says so, once.
    """

    def __init__(self) -> None:
        self.has_ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.has_ended = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.has_ended = True
        self._draw(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.has_ended:
            self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero or not state.log_history:
            return
        try:
            draw_curves(Path(args.output_dir) / "curves.png", state.log_history)
        except ImportError:
            if self.has_ended:
                logger.info("No curves.png: matplotlib is not there (pip install 'setenc_hf[plot]')")


def draw_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw the training's log entries over their steps: a panel a quantity, and one a kind of evaluation measure.

    Raises `ImportError` without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels: dict[str, list[str]] = {
        "loss": ["loss"],
        "share of pairs ordered": ["pairs_ordered"],
        "learning rate": ["learning_rate"],
        "gradient norm": ["grad_norm"],
        "passages per second": ["passages_per_second"],
    }
    names = dict.fromkeys(name for entry in history for name in entry if name.startswith("eval_"))
    evaluated = [name for name in names if not name.endswith(("_runtime", "_second"))]
    for name in evaluated:
        panels.setdefault(f"evaluation: {name.rsplit('_', 1)[-1]}", []).append(name)
    panels = {
        title: found
        for title, keys in panels.items()
        if (found := [key for key in keys if any(isinstance(entry.get(key), int | float) for entry in history)])
    }
    columns = min(3, max(len(panels), 1))
    rows = -(-max(len(panels), 1) // columns)
    figure = Figure(figsize=(4 * columns, 2.7 * rows))
    FigureCanvasAgg(figure)
    for place, (title, keys) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
        for key in keys:
            points: dict[int, float] = {}
            for entry in history:
                if isinstance(entry.get(key), int | float):  # an evaluation behind the end is of other weights
                    points.setdefault(entry["step"], entry[key])
            label = key.removeprefix("eval_").rsplit("_", 1)[0] if len(keys) > 1 else None
            axis.plot(
                list(points),
                list(points.values()),
                lw=1.4,
                marker="o" if len(points) < 40 else None,
                ms=2.5,
                label=label,
            )
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axis.legend(fontsize=7, frameon=False)
        if place > len(panels) - columns:
            axis.set_xlabel("step", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)

"""Early stopping and the best checkpoint: by a measure that evaluation reports, also after a resumption."""

from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .errors import InputError


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` by `args.early_stopping_patience`.

    Resumed from a checkpoint at which training had stopped, it stops again at once, unless it is given more patience;
    an evaluation of the very weights that were evaluated before counts no second time.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.early_stopping_patience = args.early_stopping_patience  # as it is wished now, not in the checkpoint
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        # the weights that a resumed training begins with have been judged before
        metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        if sum(entry["step"] == state.global_step and metric in entry for entry in state.log_history) < 2:
            super().on_evaluate(args, state, control, metrics, **kwargs)


def reported(measures: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return what evaluation of the sets `names` reports, without `eval_`: a single set goes without its name."""
    figures = [*measures, "loss"]
    return figures if len(names) == 1 else [f"{name}_{figure}" for name in names for figure in figures]


def check_best_metric(
    training: TrainingArguments, measures: Sequence[str], names: Sequence[str], patience: int | None
) -> None:
    """Refuse what evaluation could not do, a `metric_for_best_model` that it would not report before all.

    Args:
        training: the arguments; what asks for a best checkpoint among them decides what is needed.
        measures: names of the measures that each set reports.
        names: of the evaluation sets.
        patience: of early stopping, where it is wanted.
    """
    metric = training.metric_for_best_model
    evaluates = training.eval_strategy != IntervalStrategy.NO
    if patience is not None:
        if not names:
            raise InputError("`early_stopping_patience` needs `eval_samples` to judge by")
        if patience < 1:
            raise InputError(f"`early_stopping_patience` must be at least 1 evaluation, got {patience}")
        if not evaluates:
            raise InputError("`early_stopping_patience` needs `eval_strategy` steps or epoch: nothing is evaluated")
        if metric is None:
            raise InputError(
                "`early_stopping_patience` needs `metric_for_best_model` to judge by, one of "
                + ", ".join(reported(measures, names))
            )
    if training.save_strategy == SaveStrategy.BEST and not evaluates:
        raise InputError("`save_strategy` best needs `eval_strategy` steps or epoch: nothing is evaluated")
    if not evaluates:
        return
    if not names:
        raise InputError(
            f"`eval_strategy` {training.eval_strategy.value} needs `eval_samples`: there is nothing to evaluate"
        )
    if metric is None:
        return
    if metric.removeprefix("eval_") not in reported(measures, names):
        raise InputError(
            f"`metric_for_best_model` {metric!r} is not what {len(names)} evaluation set(s) report; it is one of "
            + ", ".join(reported(measures, names))
        )

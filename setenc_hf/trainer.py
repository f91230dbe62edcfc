"""`Trainer` for lists: any ranking loss on packed batches, and evaluation that re-ranks whole lists."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm
from transformers import ProgressCallback, TrainingArguments

from .checkpoints import CheckpointedTrainer
from .distributed import stand_alone, whole_layers
from .errors import InputError
from .hub_trainer import HubTrainer
from .lists import EpochSampler, EvaluationLists, ListwiseCollator, TrainingLists
from .losses import ListwiseLoss
from .measures import mean, ordered, parse_measures, per_query
from .progress import TrainingBar, TrainingClock, TrainingRecord

# fields of `TrainingArguments` that the stock loops read and ours do not
OF_NO_USE = {
    "train_sampling_strategy": "lists are drawn by `sampling` from the seed, the epoch and the query",
    "label_smoothing_factor": "the ranking losses have no classes to smooth",
    "bf16_full_eval": "evaluation is in the type of the training",
    "fp16_full_eval": "evaluation is in the type of the training",
    "per_device_eval_batch_size": "evaluation lists go together by `max_tokens_per_batch`",
}


@dataclass
class ListwiseTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults that lists need."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "Lists have columns that forward() has not."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed training knows how long early stopping has been patient."}
    )
    measures: list[str] = field(
        default_factory=lambda: ["nDCG@10"],
        metadata={"help": "What evaluation reports of each re-ranked set, in ir_measures' names."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better `metric_for_best_model`."},
    )
    max_tokens_per_batch: int = field(
        default=16_384,
        metadata={"help": "Evaluation lists go to the device together up to so many tokens, at least one list."},
    )

    def __post_init__(self) -> None:
        if self.max_tokens_per_batch < 1:
            raise ValueError(f"`max_tokens_per_batch` must be at least 1, got {self.max_tokens_per_batch}")
        parse_measures(self.measures)
        if self.deepspeed:
            stand_alone()
        super().__post_init__()
        known = type(self).__dataclass_fields__
        for name, why in OF_NO_USE.items():
            if name in known and getattr(self, name) != known[name].default:
                raise ValueError(f"`{name}` would change nothing: {why}; leave it out")


class ListwiseTrainer(CheckpointedTrainer, HubTrainer):
    """Fine-tunes a Set-Encoder on lists.

    Args:
        loss: takes (scores, labels), both [queries, longest list]; see [`~setenc_hf.losses`].
        train_dataset: a [`~setenc_hf.lists.TrainingLists`], or any dataset of samples the collator takes.
        eval_dataset: an [`~setenc_hf.lists.EvaluationLists`], or several by name.
        recipe: for the model card, what the model was trained by where that is more than `args`.
        kwargs: as for `Trainer`; `data_collator` defaults to a `ListwiseCollator` of `processing_class`.

    `evaluate()` re-ranks each list of the evaluation set once, over all processes, and reports the measures of
    `args.measures` over all judgements as `eval_nDCG@10` and so on, beside `eval_loss`, so that
    `metric_for_best_model="nDCG@10"` chooses the best checkpoint and drives early stopping. Ties keep the first stage's
    order, so that the figures are those of the run which `setenc_hf.rerank` writes.
    """

    def __init__(self, *args: Any, loss: ListwiseLoss, recipe: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = ListwiseCollator(kwargs["processing_class"])
        super().__init__(*args, **kwargs)
        whole_layers(self.model)
        if self.args.n_gpu > 1:
            raise InputError(
                f"{self.args.n_gpu} GPUs but one process: torch's DataParallel would cut lists apart; "
                "start with `accelerate launch --multi_gpu`, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        self.loss = loss
        self.recipe = recipe or {}
        self.label_names = ["labels"]  # forward() has no use for labels, so that Trainer cannot infer them
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps
        self.loss_is_scaled_for_ga = False
        self.record = TrainingRecord()
        self.add_callback(self.record)
        self.add_callback(TrainingClock())
        if self.pop_callback(ProgressCallback):
            self.add_callback(TrainingBar())

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        # the stock sampler draws from the global random state; ours gives a resumed run the very same lists
        lists = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(lists) if isinstance(lists, TrainingLists) else super()._get_train_sampler(train_dataset)

    def _prepare_input(self, data: Any) -> Any:
        # under DeepSpeed the stock method rounds labels to the training's type, and scores of a teacher with them
        if isinstance(data, torch.Tensor) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.loss(outputs.logits, labels)
        if self.model.training:
            self.record.add(inputs, outputs.logits, labels)
        if (penalty := getattr(self.model, "penalty", None)) is not None:  # an adapter's own, see adapters.py
            loss = loss + penalty()
        return (loss, outputs) if return_outputs else loss

    @property
    def seconds(self) -> float | None:
        """Seconds of a training that has ended, with its parts before resumptions; None where there was none."""
        (clock,) = (found for found in self.callback_handler.callbacks if isinstance(found, TrainingClock))
        return clock.ended

    @property
    def mean_loss(self) -> float | None:
        """Mean of the losses in the log, whose entries are of as many steps each; None where there are none."""
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        return sum(losses) / len(losses) if losses else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # an entry of the training, which every process makes at the same step
        super().log(logs | self.record.read(self.accelerator) if "loss" in logs else logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Re-rank every list of `eval_dataset` once and return its measures; see the class."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self._measure(part, f"{metric_key_prefix}_{name}")
        else:
            metrics = self._measure(dataset, metric_key_prefix)
        self.log(metrics)
        # once for all sets: early stopping looks for its measure among them
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, dataset: EvaluationLists, prefix: str) -> dict[str, float]:
        # the stock loop gathers by example and would lose the scores of unequal lists
        start = time.perf_counter()
        rows = self._rerank(dataset)
        values = per_query(parse_measures(self.args.measures), dataset.qrels, {row[0]: ordered(row[1]) for row in rows})
        seconds = time.perf_counter() - start
        metrics = {f"{prefix}_{name}": mean(queries) for name, queries in values.items()}
        metrics[f"{prefix}_loss"] = sum(row[2] for row in rows) / len(rows)
        metrics[f"{prefix}_runtime"] = round(seconds, 4)
        metrics[f"{prefix}_lists_per_second"] = round(len(rows) / seconds, 3)
        return metrics

    @torch.no_grad()
    def _rerank(self, dataset: EvaluationLists) -> list[tuple[str, dict[str, float], float]]:
        """Return (query_id, scores by document, loss) of every list, in their order, on every process."""
        model = self.model_wrapped if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model
        was_training = model.training
        model.eval()
        world, rank = self.args.world_size, self.args.process_index
        # each process scores as many lists as any other, which sharded weights need: the last round may score a list
        # a second time, and does not count it
        samples = (dataset[min(first + rank, len(dataset) - 1)] for first in range(0, len(dataset), world))
        sized = ((sample, sample["query_ids"], sample["passage_ids"]) for sample in samples)
        max_tokens = 1 if model is self.model_wrapped and world > 1 else self.args.max_tokens_per_batch
        mine: list[tuple[int, tuple[str, dict[str, float], float]]] = []
        number = rank
        with tqdm(
            total=len(dataset), desc="evaluate", disable=self.args.disable_tqdm or rank > 0, leave=False
        ) as progress:
            for batch_samples in self.processing_class.batches(sized, max_tokens):
                batch = self._prepare_inputs(self.data_collator(batch_samples))
                labels = batch.pop("labels")
                with self.compute_loss_context_manager():
                    scores = model(**batch).logits
                rows = zip(batch_samples, scores.split(1), labels.split(1), strict=True)
                for sample, row_scores, row_labels in rows:
                    if not torch.isfinite(row_scores[0, : len(sample["doc_ids"])]).all():
                        raise InputError(
                            f"query {sample['query_id']!r}: the scores are not finite after step "
                            f"{self.state.global_step}, the training has diverged; go on from an earlier checkpoint, "
                            "or start over, with a lower --learning_rate"
                        )
                    if number < len(dataset):
                        ranked = dict(zip(sample["doc_ids"], row_scores[0].tolist()))  # padding lies behind
                        loss = self.loss(row_scores, row_labels).item()
                        mine.append((number, (sample["query_id"], ranked, loss)))
                    number += world
                progress.update(world * len(batch_samples))
        model.train(was_training)
        numbered = gather_object(mine) if world > 1 else mine
        # one order however many processes there are: sums of figures are then the same to the last bit
        ordered = [row for _, row in sorted(numbered, key=lambda pair: pair[0])]
        if len({row[0] for row in ordered}) != len(dataset):
            raise RuntimeError(f"{len(ordered)} lists were re-ranked of {len(dataset)}: a query is missing or doubled")
        return ordered

"""What a recipe may say beside the fields of `TrainingArguments`."""

import json
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError
from .losses import LOSSES, parse_loss
from .sampling import STRATEGIES


@dataclass
class ModelArguments:
    """Which model to start from, and what to change of it; what is not given stays as the model has it."""

    model: str = field(metadata={"help": "Folder or hub id: a plain backbone, or a Set-Encoder to train on."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    interaction: str | None = field(
        default=None,
        metadata={"help": "The interaction token; none is a pointwise model.", "choices": ["int", "cls", "none"]},
    )
    depth: int | None = field(default=None, metadata={"help": "Passages per query that the model is meant for."})
    sample_missing_passages: bool | None = field(
        default=None,
        metadata={"help": "In training, fill each list up to `depth` with drawn interaction tokens."},
    )
    normalize_interaction: bool | None = field(
        default=None,
        metadata={"help": "Let a list's interaction tokens weigh as one, so that list lengths may differ in use."},
    )
    query_length: int | None = field(default=None, metadata={"help": "Tokens kept of a query."})
    passage_length: int | None = field(default=None, metadata={"help": "Tokens kept of a passage."})
    max_tokens_per_chunk: int | None = field(
        default=None,
        metadata={"help": "Tokens a layer works on at a time; with gradient checkpointing it bounds a step's memory."},
    )
    attention_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout on attention weights; 0 lets training use the fused attention kernel."},
    )
    hidden_dropout: float | None = field(default=None, metadata={"help": "Dropout on hidden states."})
    peft: str | None = field(
        default=None,
        metadata={"help": "Train an adapter: a method of PEFT by name, such as lora, adalora or ia3."},
    )
    peft_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'The method\'s own settings, such as {"r": 16, "lora_alpha": 32}; JSON on a command line.'},
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the trained model for its card, by the hub's name for it."}
    )

    def __post_init__(self) -> None:
        if self.max_tokens_per_chunk is not None and self.max_tokens_per_chunk < 1:
            raise InputError(f"`max_tokens_per_chunk` must be at least 1, got {self.max_tokens_per_chunk}")
        if isinstance(self.peft_config, str):
            try:
                self.peft_config = json.loads(self.peft_config)
            except json.JSONDecodeError as error:
                raise InputError(f"`peft_config` is no JSON ({error}), got {self.peft_config!r}") from None
        if self.peft_config is not None and not isinstance(self.peft_config, dict):
            raise InputError(f"`peft_config` is an object of settings, got {self.peft_config!r}")
        if self.peft_config is not None and self.peft is None:
            raise InputError("`peft_config` needs `peft`, the name of the method it belongs to")
        if self.peft is not None:
            from .adapters import check_method  # PEFT is an extra, and slow to import

            check_method(self.peft, self.peft_config or {})


@dataclass
class DataArguments:
    """Which lists to train and evaluate on, and with which loss."""

    train_samples: list[str] = field(metadata={"help": "Folders that data_prep.build_samples made."})
    eval_samples: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders with labels of relevance; their runs are re-ranked and measured in training."},
    )
    sampling: str = field(
        default="random",
        metadata={"help": "How passages of a list are chosen, anew each epoch.", "choices": list(STRATEGIES)},
    )
    sample_size: int = field(default=8, metadata={"help": "Passages of a list in training."})
    sample_depth: int | None = field(default=None, metadata={"help": "Draw from each run down to this rank only."})
    eval_depth: int = field(default=100, metadata={"help": "Passages re-ranked of each evaluation list."})
    loss: str = field(
        default="ranknet",
        metadata={
            "nargs": "+",  # a recipe may give the terms of a mixture as a list
            "help": f"Training loss, one of {', '.join(LOSSES)}; with options and mixed, as in "
            "'lambdaloss(weighting=ndcg2pp, k=10) + 0.5 * infonce'.",
        },
    )
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Divides the scores in every loss that does not name its own temperature."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check recipe, data and model, say what the training would take, and write nothing."},
    )
    overwrite_output: bool = field(default=False, metadata={"help": "Start over where output_dir holds a training."})

    def __post_init__(self) -> None:
        if isinstance(self.loss, list):
            self.loss = " + ".join(self.loss)
        parse_loss(self.loss, self.loss_temperature)
        if self.sample_size < 2:
            raise InputError(f"`sample_size` must be at least 2 (one passage has no order), got {self.sample_size}")
        if self.sample_depth is not None and self.sample_depth < 2:
            raise InputError(f"`sample_depth` must be at least 2 (one passage has no order), got {self.sample_depth}")
        if self.eval_depth < 1:
            raise InputError(f"`eval_depth` must be at least 1 passage, got {self.eval_depth}")

"""What a training would take: its steps, the tokens of a step and an estimate of its memory. Nothing is trained."""

import math
from dataclasses import dataclass

import numpy as np
from torch import nn

from .distributed import num_numbers
from .lists import ListwiseCollator, TrainingLists
from .modeling import SetEncoderForReranking, default_chunk
from .trainer import ListwiseTrainingArguments

SAMPLED_LISTS = 64
# states that an optimizer keeps of a weight, each as large as the weight; what is not named here is taken for Adam's
OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "adagrad": 1, "rmsprop": 1, "lion": 1}
MIB = 2**20


@dataclass(frozen=True)
class StepTokens:
    """Tokens of the batch that one process takes at once, over a sample of batches as the collator makes them."""

    sampled: int  # batches
    mean: float
    largest: int
    passages: float  # mean
    keys: float  # mean number of keys a token attends to: its passage's and one a passage of its list


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the end of a step's forward pass, where a training's memory peaks."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def count_steps(lists: int, training: ListwiseTrainingArguments) -> tuple[int, float]:
    """Return the optimizer's steps and the epochs of a training on so many lists."""
    mine = lists // training.world_size if training.dataloader_drop_last else math.ceil(lists / training.world_size)
    size = training.per_device_train_batch_size
    batches = mine // size if training.dataloader_drop_last else math.ceil(mine / size)
    per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    return steps, steps / per_epoch


def measure_tokens(train: TrainingLists, collator: ListwiseCollator, batch_size: int) -> StepTokens:
    """Collate batches of drawn lists of the first epoch, as training would, and count."""
    chosen = np.random.default_rng(train.seed).permutation(len(train))[: max(SAMPLED_LISTS, batch_size)]
    tokens, passages, keys = [], [], []
    for first in range(0, max(len(chosen) - batch_size + 1, 1), batch_size):
        batch = collator([train[(0, int(number))] for number in chosen[first : first + batch_size]])
        lengths = batch["passage_lengths"].double()
        others = batch["num_passages"].repeat_interleave(batch["num_passages"])
        tokens.append(int(lengths.sum()))
        passages.append(len(lengths))
        keys.append(float((lengths * (lengths + others)).sum() / lengths.sum()))
    return StepTokens(len(tokens), float(np.mean(tokens)), max(tokens), float(np.mean(passages)), float(np.mean(keys)))


def estimate_memory(
    model: SetEncoderForReranking, training: ListwiseTrainingArguments, tokens: int, keys: float
) -> MemoryEstimate:
    """Estimate the memory of one process that takes `tokens` tokens at once, each attending to `keys` keys.

    With $P$ weights of $b$ bytes, $P_t$ of them trained, $h$ the hidden and $i$ the intermediate size, $l$ layers,
    $a$ heads, $T$ tokens and $c$ bytes of a computed number (2 under bf16 and fp16, else $b$):

        weights       P b, and P c more for autocast's copies under bf16 or fp16
        gradients     P_t b
        optimizer     2 P_t b for Adam, fewer for those of `OPTIMIZER_STATES`
        activations   T (2 h + l (8 h + 2 i)) c: of a layer its input, queries, keys and values, attention's output,
                      both normalisations' inputs, the feed-forward part's input and its intermediate states before
                      and behind the activation function; with dropout 2 h c + 2 h more a layer (outputs and masks);
                      the last layer without the feed-forward part where only [CLS] is computed behind its attention
                      where attention weights are written out (dropout on them; float32, but on a CPU)
                      T k a 2 c more a layer, with k keys a token
                      with gradient checkpointing l h T c and, of one layer of the above, a chunk's share

    ZeRO divides the optimizer's part (stage 1), the gradients (2) and the weights (3) by the number of processes.
    What the formula leaves out: temporary buffers, the allocator's fragments, the loss (small), the process itself.
    """
    encoder = model.encoder.config
    hidden, layers = encoder.hidden_size, encoder.num_hidden_layers
    intermediate = getattr(encoder, "intermediate_size", None) or getattr(encoder, "hidden_dim", 4 * hidden)
    sizes = [(num_numbers(weight) * weight.element_size(), weight.requires_grad) for weight in model.parameters()]
    weights = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    is_mixed = training.bf16 or training.fp16
    size = 2 if is_mixed else next(model.parameters()).element_size()
    layer = (8 * hidden + 2 * intermediate) * size
    dropout = dropout_of(model)
    if dropout["hidden"]:
        layer += 2 * hidden * size + 2 * hidden
    is_written_out = training.device.type != "cpu" and size > 2  # no flash kernel for float32 on GPUs
    if dropout["attention"] or is_written_out:
        layer += keys * encoder.num_attention_heads * 2 * size
    is_cut = any(getattr(module, "is_cut", False) for module in model.modules())
    cut = (3 * hidden + 2 * intermediate) * size if is_cut else 0
    kept = layers * layer - cut
    if training.gradient_checkpointing:
        chunk = model.max_tokens_per_chunk or default_chunk(training.device) or tokens
        kept = layers * hidden * size + layer * min(chunk / tokens, 1)
    plugin = training.deepspeed_plugin  # by the recipe or by accelerate's configuration
    stage = 0 if plugin is None else plugin.hf_ds_config.get_value("zero_optimization.stage", 0)
    name = str(getattr(training.optim, "value", training.optim))
    states = next((number for kind, number in OPTIMIZER_STATES.items() if name.startswith(kind)), 2)
    copies = weights * size / next(model.parameters()).element_size() if is_mixed else 0
    parts = training.world_size
    return MemoryEstimate(
        weights=weights / (parts if stage == 3 else 1) + copies,
        gradients=trained / (parts if stage >= 2 else 1),
        optimizer=trained * states / (parts if stage >= 1 else 1),
        activations=tokens * (2 * hidden * size + kept),
    )


def dropout_of(model: nn.Module) -> dict[str, bool]:
    """Return whether a model drops hidden states, and attention weights, in training."""
    hidden = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    config = model.encoder.config  # type: ignore[union-attr]
    names = ("attention_probs_dropout_prob", "attention_dropout")
    return {"hidden": hidden, "attention": any(getattr(config, name, 0) > 0 for name in names)}  # type: ignore[arg-type]


def report(model: SetEncoderForReranking, train: TrainingLists, training: ListwiseTrainingArguments) -> str:
    """Return what the training would take, in a few lines."""
    steps, epochs = count_steps(len(train), training)
    batch_size = training.per_device_train_batch_size
    collator = ListwiseCollator(model.tokenizer)  # type: ignore[arg-type]
    tokens = measure_tokens(train, collator, batch_size)
    accumulated = training.gradient_accumulation_steps * training.world_size
    memory = estimate_memory(model, training, tokens.largest, tokens.keys)
    parts = ", ".join(
        f"{name} {getattr(memory, name) / MIB:,.0f}" for name in ("weights", "gradients", "optimizer", "activations")
    )
    return (
        f"steps     {steps:,} of {batch_size * accumulated} lists, {epochs:.2f} epochs\n"
        f"tokens    {tokens.mean * accumulated:,.0f} a step; {tokens.mean:,.0f} at once on a process (largest "
        f"{tokens.largest:,}, {tokens.passages:,.0f} passages; {tokens.sampled} batches sampled)\n"
        f"memory    about {memory.total / MIB:,.0f} MiB a process for the largest of these batches ({parts}), beside "
        "what Python and torch take"
    )

"""Average the weights of models that were trained from one start, and of that start.

    python -m setenc_hf.average_models --models A B [C ...] [--weights 1 1 1] --output O

The mean of several trainings of one backbone, with other seeds or labels, is often better than each of them (model
soups, Wortsman et al. 2022, arXiv 2203.05482), and so is the mean of a training and what it started from, which it has
forgotten in part (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903). It costs nothing where the model is used. A plain
backbone among the models counts with its own weights and the start of `[INT]`; the score head, which it has not, is
the mean of the others.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import run_command
from .errors import InputError
from .files import atomic_folder
from .hub import find_model, opening

if TYPE_CHECKING:
    from torch import Tensor

    from .modeling import SetEncoderForReranking

# what the weights were trained for: other values of the first model would be wrong for the others' weights
SAME_FIELDS = ("interaction", "normalize_interaction", "linear_bias")
CARD = """---
library_name: transformers
pipeline_tag: text-ranking
tags:
- listwise
- reranker
- set-encoder
---

# {name}

A Set-Encoder ([arXiv 2404.06912](https://arxiv.org/abs/2404.06912)): a cross-encoder that scores the passages of a
query together, whatever their order. Its weights are a mean of those of other models:

| weight | model |
| --- | --- |
{rows}

```python
from setenc_hf import SetEncoderForReranking

SetEncoderForReranking.from_pretrained("{name}").rank(query, passages)  # best first
```
"""


def average(models: Sequence[str], weights: Sequence[float]) -> "SetEncoderForReranking":
    """Return the first of the models with the weighted mean of all their weights, summed in float64.

    Args:
        models: folders or hub ids; the first is a trained Set-Encoder, whose configuration and tokenizer stay.
        weights: one a model, at least 0; they count in proportion to their sum.

    Raises `InputError` where the models do not fit together.
    """
    import torch

    first = open_whole(models[0])
    if first.is_head_new:
        raise InputError(f"{models[0]}: is no Set-Encoder yet; name a trained one first, and a plain backbone after it")
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in first.state_dict().items()}
    totals = dict.fromkeys(sums, 0.0)
    for name_or_path, weight in zip(models, weights, strict=True):
        model = first if name_or_path == models[0] else open_whole(name_or_path, first)
        if model is not first:
            check_alike(models[0], first, name_or_path, model)
        for name, tensor in model.state_dict().items():
            if not (model.is_head_new and name.startswith("linear.")):
                sums[name] += weight * tensor.double()
                totals[name] += weight
    without = [name for name, total in totals.items() if total == 0]
    if without:
        raise InputError(f"no model with a weight above 0 has {without[0]!r}; give a trained model some weight")
    means: dict[str, Tensor] = {name: total / totals[name] for name, total in sums.items()}
    first.load_state_dict(means)
    return first


def open_whole(name_or_path: str, like: "SetEncoderForReranking | None" = None) -> "SetEncoderForReranking":
    """Open a model that is no adapter; a plain backbone as the start of a model `like` this one."""
    from transformers import PreTrainedConfig

    from .modeling import SetEncoderForReranking

    found = find_model(name_or_path)
    with opening(name_or_path):
        fields: dict[str, Any] = {}
        if like is not None and PreTrainedConfig.get_config_dict(found)[0].get("model_type") != like.config.model_type:
            fields = {name: getattr(like.config, name) for name in SAME_FIELDS}
        model = SetEncoderForReranking.from_pretrained(found, **fields)
        model.open_tokenizer()
    if "adapter" in model.__dict__:
        raise InputError(f"{name_or_path}: is an adapter; make a model of it first, with setenc_hf.merge_adapter")
    return model


def check_alike(first_name: str, first: "SetEncoderForReranking", name: str, model: "SetEncoderForReranking") -> None:
    """Raise `InputError` where the weights of two models do not mean the same."""
    for field in SAME_FIELDS:
        ours, theirs = getattr(first.config, field), getattr(model.config, field)
        if ours != theirs:
            raise InputError(f"`{field}` is {ours!r} in {first_name} and {theirs!r} in {name}: their mean is no model")
    shapes = ({key: tuple(value.shape) for key, value in part.state_dict().items()} for part in (first, model))
    different = [key for key, _ in set.symmetric_difference(*(set(part.items()) for part in shapes))]
    if different:
        raise InputError(f"{name} has other weights than {first_name}, such as {min(different)}: not of one backbone")
    if first.open_tokenizer().backend.get_vocab() != model.open_tokenizer().backend.get_vocab():
        raise InputError(f"{name} has another vocabulary than {first_name}: not of one backbone")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m setenc_hf.average_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", required=True, help="folders or hub ids; the first gives configuration and tokenizer")
    add("--weights", nargs="+", type=float, help="one a model, in proportion (default: all the same)")
    add("--output", type=Path, required=True, help="folder to write")
    add("--overwrite", action="store_true", help="replace the folder where it exists")
    args = parser.parse_args(argv)
    weights = args.weights or [1.0] * len(args.models)
    if len(args.models) < 2:
        raise InputError("--models names one model; a mean takes two")
    if len(weights) != len(args.models):
        raise InputError(f"--weights has {len(weights)} numbers for {len(args.models)} models; give one a model")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise InputError(f"--weights are at least 0 and not all 0, got {' '.join(map(str, weights))}")

    from transformers import set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    set_seed(0)  # rows of a backbone's embeddings that no token has are drawn where `[INT]` is added
    with atomic_folder(args.output, args.overwrite) as folder:
        model = average(args.models, weights)
        model.save_pretrained(folder)
        shares = [weight / sum(weights) for weight in weights]
        rows = [
            f"| {share:.4g} | {Path(name).name if Path(name).exists() else name} |"
            for name, share in zip(args.models, shares)
        ]
        (folder / "README.md").write_text(CARD.format(name=args.output.name, rows="\n".join(rows)), "utf-8")
    for name, share in zip(args.models, shares):
        print(f"{share:>8.4f}  {name}")
    print(f"Averaged {len(args.models)} models; wrote {args.output}")


if __name__ == "__main__":
    run_command(main)

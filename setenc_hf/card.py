"""The model card that is saved after training: what the model is, what it was made of, and how good it is."""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .arguments import DataArguments, ModelArguments
from .distributed import num_numbers
from .lists import EvaluationLists, TrainingLists
from .measures import mean, parse_measures, per_query
from .samples import source_lines

if TYPE_CHECKING:
    from .trainer import ListwiseTrainer

CITATION = """@inproceedings{schlatt:2025,
  author    = {Ferdinand Schlatt and Maik Fr{\\"o}be and Harrisen Scells and Shengyao Zhuang and Bevan Koopman and
               Guido Zuccon and Benno Stein and Martin Potthast and Matthias Hagen},
  title     = {Set-Encoder: Permutation-Invariant Inter-Passage Attention for Listwise Passage Re-Ranking with
               Cross-Encoders},
  booktitle = {Advances in Information Retrieval (ECIR 2025)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2404.06912}
}"""
# of a recipe, what says where this machine keeps things, how it logs, or follows from the rest
LEFT_OUT = [
    "_dir",
    "hub_",
    "push_",
    "report_to",
    "logging_",
    "disable_tqdm",
    "run_name",
    "overwrite_",
    "license",
]
LEFT_OUT += ["accelerator_config", "do_eval", "do_train", "dataloader_", "use_cpu", "resume_from", "debug"]
ALWAYS = {
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "seed",
    "loss",
    "sampling",
    "sample_size",
}


def write_card(trainer: "ListwiseTrainer", path: Path, **metadata: Any) -> None:
    """Write the card of a trained model; `metadata` are fields of `ModelCardData`, such as `license` and `language`."""
    path.write_text(str(make_card(trainer, **metadata)), "utf-8")


def make_card(trainer: "ListwiseTrainer", **metadata: Any) -> ModelCard:
    """Return the card of what a trainer trained, in the hub's format.

    The first stage is measured on the very lists that the model re-ranked, cut at the same depth.
    """
    name = metadata.pop("model_name", None) or Path(trainer.args.output_dir).name
    adapter = getattr(trainer.model, "peft_config", None)
    base = str(trainer.recipe.get("model") or getattr(trainer.model, "name_or_path", "") or "")
    rows = list(measured(trainer))
    tags = metadata.pop("tags", None) or []
    given: dict[str, Any] = {
        "license": trainer.recipe.get("license"),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-ranking",
        "base_model": base if base and not os.path.exists(base) else None,
        "base_model_relation": "adapter" if adapter else "finetune",
        "tags": sorted({"set-encoder", "listwise", "reranker", *([tags] if isinstance(tags, str) else tags)}),
        **{field: value for field, value in metadata.items() if value is not None},
    }
    if given["base_model"] is None:
        given.pop("base_model_relation")
    if rows:
        given["model_name"] = name
        given["eval_results"] = [
            EvalResult("text-ranking", "custom", lists, measure, value, task_name="Passage re-ranking")
            for lists, measure, _, value, _ in rows
        ]
    data = ModelCardData(**{field: value for field, value in given.items() if value is not None})
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}\n\n{describe(trainer, base)}",
        f"## Use\n\n{usage(trainer, name, bool(adapter))}",
        f"## Measures\n\n{measures_table(rows)}",
        f"## Data\n\n{data_table(trainer)}",
        f"## Training\n\n{training(trainer)}",
        f"## Licence\n\n{licence(given['license'])}",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return ModelCard("\n\n".join(sections) + "\n")


def describe(trainer: "ListwiseTrainer", base: str) -> str:
    """Return the card's first paragraph."""
    config: Any = trainer.model.config
    tokens = {"int": "a token `[INT]` of each passage", "cls": "the `[CLS]` token of each passage", "none": "nothing"}
    start = f"`{Path(base).name if os.path.exists(base) else base}`, " if base else ""
    return (
        "A Set-Encoder: a cross-encoder that scores the passages of a query together, whatever their order "
        f"([arXiv 2404.06912](https://arxiv.org/abs/2404.06912)). It was trained from {start}a backbone of type "
        f"{config.encoder_config.model_type}; the passages see each other through {tokens[config.interaction]}. "
        f"Queries are cut at {config.query_length} tokens and passages at {config.passage_length}; it is meant for "
        f"{config.depth} passages a query."
    )


def usage(trainer: "ListwiseTrainer", name: str, is_adapter: bool) -> str:
    """Return how to load it, with this package and without."""
    name = trainer.args.hub_model_id or name
    with_package = (
        f"```python\nfrom setenc_hf import SetEncoderForReranking\n\n"
        f'model = SetEncoderForReranking.from_pretrained("{name}")\nmodel.rank(query, passages)  # best first\n```'
    )
    if is_adapter:
        return f"This is an adapter: opening it opens its base model too.\n\n{with_package}"
    return (
        f"{with_package}\n\nWithout the package, by the code that lies beside the weights:\n\n```python\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        f'model = AutoModelForSequenceClassification.from_pretrained("{name}", trust_remote_code=True)\n'
        "model.rank(query, passages)\n```"
    )


def measured(trainer: "ListwiseTrainer") -> Iterator[tuple[str, str, float, float, int]]:
    """Yield (evaluation set, measure, the first stage's value, the model's, step) of the last evaluation of each."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    for name, lists in sets.items():
        if not isinstance(lists, EvaluationLists):
            continue
        first = first_stage(lists, trainer.args.measures)
        prefix = f"eval_{name}_" if name else "eval_"
        for measure in trainer.args.measures:
            entries = [entry for entry in trainer.state.log_history if prefix + measure in entry]
            if entries:
                last = entries[-1]
                yield lists.samples.folder.name, measure, first[measure], last[prefix + measure], last["step"]


def first_stage(lists: EvaluationLists, names: list[str]) -> dict[str, float]:
    """Return the measures of the lists in the order that they were retrieved in, at the depth that is re-ranked."""
    run = {}
    for row in range(len(lists)):
        sample = lists[row]
        run[sample["query_id"]] = {doc_id: -float(place) for place, doc_id in enumerate(sample["doc_ids"])}
    return {name: mean(values) for name, values in per_query(parse_measures(names), lists.qrels, run).items()}


def measures_table(rows: list[tuple[str, str, float, float, int]]) -> str:
    """Return the measures beside the first stage's."""
    if not rows:
        return "Nothing was measured during this training."
    table = ["| lists | measure | first stage | this model | step |", "| --- | --- | --- | --- | --- |"]
    table += [
        f"| {lists} | {name} | {first:.4f} | {value:.4f} | {step:,} |" for lists, name, first, value, step in rows
    ]
    return "\n".join(table) + "\n\nThe first stage is the order of the very lists that the model re-ranked."


def data_table(trainer: "ListwiseTrainer") -> str:
    """Return the sample folders, what they hold, and the hashes of what they were made from."""
    used: list[tuple[str, Any]] = []
    if isinstance(trainer.train_dataset, TrainingLists):
        used += [("training", samples) for samples in trainer.train_dataset.samples]
    sets = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    used += [("evaluation", lists.samples) for lists in sets if isinstance(lists, EvaluationLists)]
    if not used:
        return "The data came from outside this toolkit's sample folders and is not described here."
    parts = []
    for use, samples in used:
        counts = samples.meta.get("counts", {})
        lines = [f"**{samples.folder.name}** ({use}), labels of {samples.labels_kind}:", ""]
        lines += [f"- {count:,} {reason}" for reason, count in counts.items()]
        lines += source_lines(samples.meta.get("sources", {}))
        parts.append("\n".join(lines))
    if isinstance(trainer.train_dataset, TrainingLists):
        left_out = trainer.train_dataset.left_out
        parts.append("\n".join(f"Left out in training: {count:,} {reason}." for reason, count in left_out.items()))
    return "\n\n".join(part for part in parts if part)


def training(trainer: "ListwiseTrainer") -> str:
    """Return the recipe where it differs from the defaults, the time it took, and the machine."""
    args = trainer.args
    recipe = {name: value for name, value in changed_settings(trainer).items() if value not in (None, [], {})}
    for name in recipe.keys() & {"train_samples", "eval_samples"}:
        recipe[name] = [Path(folder).name for folder in recipe[name]]
    if os.path.exists(str(recipe.get("model"))):
        recipe["model"] = Path(str(recipe["model"])).name
    parameters = list(trainer.model.parameters())
    trained = sum(num_numbers(weight) for weight in parameters if weight.requires_grad)
    total = sum(map(num_numbers, parameters))
    seconds = trainer.seconds
    return (
        f"{trained:,} of {total:,} weights were trained in {trainer.state.global_step:,} steps"
        f"{f' and {seconds:,.0f} seconds' if seconds is not None else ''}, by {args.world_size} process(es) on "
        f"{hardware()}. What the recipe changes of the defaults:\n\n"
        f"```json\n{json.dumps(recipe, indent=2, sort_keys=True, default=str)}\n```"
    )


def changed_settings(trainer: "ListwiseTrainer") -> dict[str, Any]:
    """Return what of the recipe and the training arguments is not as by default, and what one always asks for."""
    settings = {}
    for kind in (ModelArguments, DataArguments, type(trainer.args)):
        for field in fields(kind):
            if not field.init or any(part in field.name for part in LEFT_OUT):
                continue
            default = field.default if field.default_factory is MISSING else field.default_factory()
            ours = trainer.recipe.get(field.name, default)
            value = getattr(trainer.args, field.name) if kind is type(trainer.args) else ours
            is_unset = value is MISSING or (default is None and value is False)
            if not is_unset and (value != default or field.name in ALWAYS):
                settings[field.name] = value
    return settings


def hardware() -> str:
    """Return what a process computed on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads a process"


def licence(name: str | None) -> str:
    """Return the card's word on the licence."""
    given = f"The model is given away under `{name}`." if name else "Its makers have not named a licence yet."
    return f"{given} The licences of the backbone and of the data hold beside it."

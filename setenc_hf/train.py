"""Fine-tune a Set-Encoder from a recipe.

    accelerate launch -m setenc_hf.train recipes/stage1.json [--any_argument value]

A recipe is a flat JSON file with fields of `TrainingArguments` and of `setenc_hf.arguments`; the command line
overrides it. `--resume_from_checkpoint last` goes on where an interrupted training stopped, `auto` does, or starts;
`--dry-run` checks all of it, says what it would take and writes nothing.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import get_model_param_count

from .arguments import DataArguments, ModelArguments
from .checkpoints import FILES, last_checkpoint, later_checkpoints, lies_in, missing_files, move_away
from .collection import query_key
from .command import run_command
from .cpu_linear import is_bfloat16_fast
from .distributed import check_launch, leave, start_deepspeed, wait_for_all
from .dry_run import count_steps, report
from .early_stopping import EarlyStopping, check_best_metric
from .errors import InputError
from .files import PARTIAL
from .hub import find_model, opening
from .lists import EvaluationLists, TrainingLists
from .losses import parse_loss
from .measures import parse_measures
from .modeling import SetEncoderForReranking
from .progress import CurvesCallback
from .recipe import given_fields, parse_recipe
from .samples import ListwiseSamples
from .tokenization import SetEncoderTokenizer
from .trainer import ListwiseTrainer, ListwiseTrainingArguments

logger = logging.getLogger(__name__)
LATEST = ("last", "true", "auto")  # of `resume_from_checkpoint`: the last checkpoint, wherever it is
OF_ONE_START = ("hub_token", "resume_from_checkpoint", "overwrite_output", "dry_run")  # not of what it makes
ARGUMENTS = (ModelArguments, DataArguments, ListwiseTrainingArguments)


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, ListwiseTrainingArguments]:
    """Parse a recipe and what overrides it."""
    # on CPUs several processes would each train alone if nobody said so
    defaults = {} if torch.accelerator.is_available() else {"use_cpu": True}
    try:
        return parse_recipe(ARGUMENTS, argv, "python -m setenc_hf.train", defaults)  # type: ignore[return-value]
    except (ValueError, ImportError) as error:  # what TrainingArguments refuses, in its own words
        raise InputError(str(error)) from None


def load_model(args: ModelArguments) -> tuple[SetEncoderForReranking, SetEncoderTokenizer]:
    """Open the model to start from, with what the recipe changes of it, and its tokenizer."""
    overrides = {name: value for name, value in asdict(args).items() if value is not None}
    name_or_path, revision = overrides.pop("model"), overrides.pop("model_revision", "main")
    for name in ("peft", "peft_config", "license"):  # what is made of the model, not what it is
        overrides.pop(name, None)
    max_tokens_per_chunk = overrides.pop("max_tokens_per_chunk", None)  # how it computes, not what
    find_model(name_or_path)  # one line within seconds where it cannot be had; its own name goes into what is saved
    with opening(name_or_path):
        # whatever type it is stored in: AdamW's steps are less than a digit of a weight in bfloat16, and are lost
        model = SetEncoderForReranking.from_pretrained(
            name_or_path, revision=revision, dtype=torch.float32, **overrides
        )
        tokenizer = model.open_tokenizer()
    check_lengths(model, tokenizer)
    if "adapter" in model.__dict__:  # an adapter that was trained before: go on from what it makes of its base
        from .adapters import merge

        model = merge(model)
    model.max_tokens_per_chunk = max_tokens_per_chunk
    return model, tokenizer


def check_lengths(model: SetEncoderForReranking, tokenizer: SetEncoderTokenizer) -> None:
    """Refuse lengths that need more positions than the backbone has: it would fail on the first long text."""
    positions = model.num_positions
    num_special = tokenizer.template.num_special
    query_length, passage_length = tokenizer.query_length, tokenizer.passage_length
    needed = num_special + query_length + passage_length
    if positions is None or needed <= positions:
        return
    longest = positions - num_special - query_length
    raise InputError(
        f"`query_length` {query_length} and `passage_length` {passage_length} need {needed} positions "
        f"with {num_special} special tokens, but the {model.config.encoder_config.model_type} backbone has "
        f"{positions}: lower " + (f"`passage_length` to {longest} or less" if longest > 0 else "both")
    )


def load_data(
    args: DataArguments, tokenizer: SetEncoderTokenizer, training: ListwiseTrainingArguments
) -> tuple[TrainingLists, dict[str, EvaluationLists]]:
    """Open training and evaluation lists; the first process tokenises what has not been tokenised yet."""
    with training.main_process_first(desc="tokenising the samples"):
        train = TrainingLists(
            [ListwiseSamples.open(folder) for folder in args.train_samples],
            tokenizer,
            strategy=args.sampling,
            sample_size=args.sample_size,
            depth=args.sample_depth,
            seed=training.data_seed if training.data_seed is not None else training.seed,
            store_tokens=not args.dry_run,
        )
        evaluated = {
            Path(folder).name: EvaluationLists(
                ListwiseSamples.open(folder), tokenizer, args.eval_depth, store_tokens=not args.dry_run
            )
            for folder in args.eval_samples
        }
    if len(evaluated) < len(args.eval_samples):
        raise InputError(f"`eval_samples` are told apart by their folders' names, which repeat: {args.eval_samples}")
    check_labels(args, train)
    check_shared_queries(train, evaluated)
    return train, evaluated


def check_labels(args: DataArguments, train: TrainingLists) -> None:
    """Refuse labels that the loss or the sampling cannot use."""
    needs = parse_loss(args.loss, args.loss_temperature).needs
    for samples in train.samples:
        kind = samples.labels_kind
        if kind not in needs:
            raise InputError(
                f"loss {args.loss!r} needs labels of {' or '.join(needs)}, {samples.folder} has labels of {kind}"
            )
        if args.sampling == "single_relevant" and kind != "relevance":
            raise InputError(f"sampling 'single_relevant' needs labels of relevance, {samples.folder} has {kind}")


def check_shared_queries(train: TrainingLists, evaluated: dict[str, EvaluationLists]) -> None:
    """Refuse an evaluation set with queries that are trained on: its figures would mean nothing."""
    texts = {query_key(text) for samples in train.samples for text in samples.samples["query"]}
    for name, lists in evaluated.items():
        shared = [text for text in lists.samples.samples["query"] if query_key(text) in texts]
        if shared:
            raise InputError(
                f"evaluation set {name!r} shares {len(shared)} queries with the training samples (such as "
                f"{shared[0]!r}); its figures would mean nothing: evaluate on other queries"
            )


def prepare_output(args: DataArguments, training: ListwiseTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, if any; refuse to write over an earlier training, or a part, unasked.

    What may be written over is still there afterwards: [`empty_output`] removes it once the training can begin.
    """
    output, wish = Path(training.output_dir), training.resume_from_checkpoint
    word = wish.lower() if wish else None
    if word in LATEST:
        found, incomplete = last_checkpoint(output)
        for path in incomplete:
            logger.warning(f"{path}: left out, it lacks {', '.join(missing_files(path)[:3])}")
        if found is not None:
            return str(found)
        if word != "auto":
            raise InputError(
                f"{output}: holds no checkpoint to resume from; leave out --resume_from_checkpoint, or pass auto to "
                "start where there is none"
            )
    elif wish:
        if not Path(wish).is_dir():
            raise InputError(f"{wish}: no such checkpoint folder")
        missing = missing_files(Path(wish))
        if missing and missing != [FILES]:
            raise InputError(f"{wish}: not a whole checkpoint, it lacks {', '.join(missing[:3])}; resume from another")
        later = later_checkpoints(output, Path(wish))
        if later and not args.overwrite_output:
            raise InputError(
                f"{output}: {', '.join(path.name for path in later)} would be taken for checkpoints of what goes on "
                f"from {wish}; have them removed with --overwrite_output, or choose another --output_dir"
            )
        if lies_in(Path(wish), output):
            return wish
    if output.is_dir() and any(output.iterdir()):
        # a training that was killed before its first checkpoint has left these alone, and nothing to go on from
        is_worthless = all(path.name in (PARTIAL, "runs") for path in output.iterdir())
        if not args.overwrite_output and not (word == "auto" and is_worthless):
            raise InputError(
                f"{output}: holds an earlier training; go on with --resume_from_checkpoint last, start over with "
                "--overwrite_output, or choose another --output_dir"
            )
    return None if word in LATEST else wish


def check_reporting(training: ListwiseTrainingArguments) -> None:
    """Raise `InputError` where `report_to` names what is not installed."""
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise InputError(f"`report_to` {' '.join(training.report_to)} cannot be had: {error}") from None


def empty_output(training: ListwiseTrainingArguments, needed: Sequence[str]) -> None:
    """Remove an earlier training; raises `InputError` where the folder holds what this one needs."""
    output = Path(training.output_dir).resolve()
    for path in (*needed, "."):
        # a link in the folder goes with it, as what a link elsewhere leads to
        is_within = Path(path).resolve().is_relative_to(output) or Path(os.path.abspath(path)).is_relative_to(output)
        if Path(path).exists() and is_within:
            raise InputError(
                f"{training.output_dir}: holds {path}, which this training needs; choose another --output_dir"
            )
    if training.should_save and output.is_dir():
        shutil.rmtree(output)
    wait_for_all()


def describe(
    model: SetEncoderForReranking,
    train: TrainingLists,
    evaluated: dict[str, EvaluationLists],
    training: ListwiseTrainingArguments,
    args: DataArguments,
) -> str:
    """Return what is about to happen, in a few lines."""
    weights = get_model_param_count(model, trainable_only=True)  # also where ZeRO-3 has split them
    lists = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    left_out = "".join(f"\n  left out: {count:,} {reason}" for reason, count in train.left_out.items())
    for name, lists_of in evaluated.items():
        left_out += f"\nevaluate  {len(lists_of):,} lists of {name}, depth {lists_of.depth}"
        left_out += "".join(f"\n  left out: {count:,} {reason}" for reason, count in lists_of.left_out.items())
    return (
        f"model     {model.config.encoder_config.model_type}, {weights:,} trained weights, interaction "
        f"{model.config.interaction!r}, {model.config.query_length} + {model.config.passage_length} tokens\n"
        f"data      {len(train):,} lists, {args.sampling} {args.sample_size} passages each{left_out}\n"
        f"training  loss {args.loss}, {lists} lists a step over {training.world_size} process(es) on {training.device}"
    )


def last_evaluation(trainer: ListwiseTrainer) -> dict[str, float]:
    """Return the measures of the weights as they are now, where the last step has just evaluated them."""
    if trainer.args.load_best_model_at_end:
        return {}
    history = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
    return {name: value for entry in history for name, value in entry.items() if name.startswith("eval_")}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and save; return the last evaluation's measures."""
    argv = list(sys.argv[1:] if argv is None else argv)
    model_args, data_args, training = parse(argv)
    given = given_fields(ARGUMENTS, argv)  # now, since the recipe's file may have been edited when it is over
    is_main = training.process_index == 0
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s")
    check_launch(training)
    if is_main and training.bf16 and not is_bfloat16_fast(training.device):
        logger.warning(
            f"--bf16 on {training.device}, which has no instructions for bfloat16 and emulates it, slower than "
            "float32: pass --bf16 false"
        )
    start_deepspeed(training)
    with training.main_process_first(local=training.save_on_each_node, desc="looking for an earlier training"):
        checkpoint = prepare_output(data_args, training)
    set_seed(training.seed)  # the new head must be the same on every process
    model, tokenizer = load_model(model_args)
    train, evaluated = load_data(data_args, tokenizer, training)
    check_reporting(training)
    patience = training.early_stopping_patience
    check_best_metric(training, list(parse_measures(training.measures)), list(evaluated), patience)
    callbacks: list[Any] = [CurvesCallback()]
    if patience is not None:
        callbacks.append(EarlyStopping(patience))
    trained: Any = model
    if model_args.peft is not None:
        from .adapters import AdapterCallback, add_adapter

        settings: Any = model_args.peft_config
        trained = add_adapter(model, model_args.peft, settings, model_args.model_revision)
        callbacks.append(AdapterCallback(trained, training, count_steps(len(train), training)[0], checkpoint))
    if is_main:
        print(describe(model, train, evaluated, training, data_args))
    if data_args.dry_run:
        if is_main:
            print(f"{report(model, train, training)}\nDry run: nothing was written")
        return {}
    settled = {**asdict(model_args), **asdict(data_args)}
    recipe = {name: settled.get(name, value) for name, value in given.items() if name not in OF_ONE_START}
    trainer = ListwiseTrainer(
        recipe=recipe,
        model=trained,
        args=training,
        loss=parse_loss(data_args.loss, data_args.loss_temperature),
        train_dataset=train,
        eval_dataset=(next(iter(evaluated.values())) if len(evaluated) == 1 else evaluated) or None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    output = Path(training.output_dir)  # whose earlier training goes only now that nothing can refuse this one
    if checkpoint is None or not lies_in(Path(checkpoint), output):
        needed = [model_args.model, *data_args.train_samples, *data_args.eval_samples]
        empty_output(training, needed if checkpoint is None else [*needed, checkpoint])
    elif training.should_save and data_args.overwrite_output:
        for path in later_checkpoints(output, Path(checkpoint)):
            print(f"Removed {path}, which is later than what is gone on from")
            move_away(path, output)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    measures = last_evaluation(trainer) or (trainer.evaluate() if evaluated else {})
    trainer.save_model(_internal_call=True)  # without a push: the files that go with it are not written yet
    trainer.save_state()
    trainer.create_model_card()
    if is_main:
        (output / "recipe.json").write_text(json.dumps(recipe, indent=2, sort_keys=True) + "\n", "utf-8")
        # of a resumed training, its own loss is of the steps since then
        loss = trainer.mean_loss if checkpoint is not None else None
        figures = {"train_seconds": trainer.seconds, "train_loss": result.training_loss if loss is None else loss}
        figures |= measures
        (output / "results.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
        for name, value in figures.items():
            print(f"{name:<28} {value:.4f}")
        print(f"Saved the model to {output}")
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
    wait_for_all()
    if training.push_to_hub:
        trainer.push_to_hub()
        if is_main:
            print(f"Pushed it to {trainer.hub_model_id}")
    return measures


if __name__ == "__main__":
    run_command(main)
    leave()

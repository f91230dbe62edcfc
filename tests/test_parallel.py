"""Several processes and interrupted trainings: the same figures and the same weights as one process, uninterrupted."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from setenc_hf.checkpoints import last_checkpoint, missing_files, rotate, seal
from setenc_hf.errors import InputError
from setenc_hf.hub_trainer import HubTrainer
from setenc_hf.lists import EvaluationLists, ListwiseCollator
from setenc_hf.losses import RankNetLoss
from setenc_hf.modeling import SetEncoderForReranking
from setenc_hf.samples import ListwiseSamples
from setenc_hf.tokenization import SetEncoderTokenizer
from setenc_hf.train import main as train
from setenc_hf.trainer import ListwiseTrainer
from small_collection import make_samples

# what every process runs: the command, and its death at a step, in the middle of it or of writing its checkpoint
COMMAND = """
import os, signal, sys
from transformers import Trainer
from setenc_hf.distributed import leave
from setenc_hf.train import main

def deadly(method, step):
    def wrapped(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **kwargs)
    return wrapped

method, step = sys.argv[1].split(":")
if method:
    setattr(Trainer, method, deadly(getattr(Trainer, method), int(step)))
main(sys.argv[2:])
leave()
"""
# weights are really released after use, which small models' never are otherwise
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.fixture(scope="module")
def recipe(backbones, tmp_path_factory) -> str:
    """A recipe over six lists, evaluated on two sets of five and three, an odd number for two processes."""
    folder = tmp_path_factory.mktemp("parallel")
    for seed, (name, queries) in enumerate({"train": 6, "one": 5, "two": 3}.items()):
        make_samples(folder, name, seed, queries, has_own_queries=name != "train")
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    values = {
        "model": backbones["bert"],
        "passage_length": 20,
        "query_length": 8,
        "train_samples": [str(folder / "train")],
        "eval_samples": [str(folder / "one"), str(folder / "two")],
        "sample_size": 6,
        "max_steps": 6,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_on_start": True,
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_two_nDCG@10",
        "disable_tqdm": True,
        "report_to": "none",
    }
    (folder / "recipe.json").write_text(json.dumps(values))
    return str(folder / "recipe.json")


def launch(processes: int, words: list[str], kill: str = ":", threads: int = 1) -> list[str]:
    """Run the command in several processes at once as a launcher does; return what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": port, "OMP_NUM_THREADS": threads, "PYTHONPATH": Path(__file__).parents[1]}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, kill, *words],
                env=os.environ | {name: str(value) for name, value in place.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, printed):
        # gloo's threads now and then abort a process that has done everything and left the group
        expected = (-9, -6, 1) if kill != ":" else (0, -6)
        assert process.returncode in expected, text[-4000:]
    return printed


def history(output: Path, name: str) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def assert_equal_weights(first: Path, second: Path) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.slow
def test_two_processes_train_evaluate_and_stop_as_one(recipe, tmp_path):
    words = [recipe, "--hidden_dropout", "0", "--attention_dropout", "0", "--max_steps", "40"]
    words += ["--early_stopping_patience", "2"]
    train([*words, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "one")])
    launch(2, [*words, "--output_dir", str(tmp_path / "two")])
    one, two = tmp_path / "one", tmp_path / "two"
    for figure in ("eval_one_nDCG@10", "eval_one_loss", "eval_two_nDCG@10", "eval_two_loss"):
        # before the first step the weights are the same to the bit; later ones have added gradients in another order
        assert history(two, figure)[0] == pytest.approx(history(one, figure)[0], abs=1e-6)
        assert history(two, figure)[:3] == pytest.approx(history(one, figure)[:3], abs=1e-3)
    assert history(two, "loss")[:4] == pytest.approx(history(one, "loss")[:4], rel=1e-3)
    states = [json.loads((output / "trainer_state.json").read_text()) for output in (one, two)]
    assert states[0]["global_step"] == states[1]["global_step"] < 40
    assert states[0]["best_global_step"] == states[1]["best_global_step"] < states[1]["global_step"]
    best = two / f"checkpoint-{states[1]['best_global_step']}"
    assert states[1]["best_model_checkpoint"] == str(best)
    assert_equal_weights(two, best)
    assert {path.name for path in two.glob("checkpoint-*")} == {best.name, f"checkpoint-{states[1]['global_step']}"}


@pytest.mark.slow
def test_a_process_killed_while_it_saves_resumes_from_the_checkpoint_before(recipe, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train([recipe, "--output_dir", str(whole)])
    words = [recipe, "--output_dir", str(cut)]
    launch(1, words, kill="_save_rng_state:4", threads=torch.get_num_threads())
    assert [path.name for path in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (cut / ".partial" / "checkpoint-4" / "model.safetensors").exists()
    train([*words, "--resume_from_checkpoint", "last"])
    assert history(cut, "loss") == history(whole, "loss")
    assert_equal_weights(cut, whole)
    assert not (cut / ".partial").exists()
    # a training that ended has nothing left to do: not a step more, where the stock Trainer goes one beyond
    assert json.loads((whole / "trainer_state.json").read_text())["global_step"] == 6
    train([recipe, "--output_dir", str(whole), "--max_steps", "6", "--resume_from_checkpoint", "auto"])
    assert json.loads((whole / "trainer_state.json").read_text())["global_step"] == 6
    assert_equal_weights(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_killed_at_a_step_two_processes_resume_to_the_same_weights(recipe, tmp_path, stage):
    words = [recipe, "--load_best_model_at_end", "false", "--eval_strategy", "no", "--eval_on_start", "false"]
    if stage:  # else plain DDP
        pytest.importorskip("deepspeed")
        (tmp_path / "zero.json").write_text(json.dumps(ZERO3 | {"zero_optimization": {"stage": stage}}))
        words += ["--deepspeed", str(tmp_path / "zero.json")]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch(2, [*words, "--output_dir", str(whole)])
    launch(2, [*words, "--output_dir", str(cut)], kill="training_step:5")
    assert not (cut / "model.safetensors").exists()
    assert (cut / "checkpoint-4").exists()
    launch(2, [*words, "--output_dir", str(cut), "--resume_from_checkpoint", "auto"])
    assert history(cut, "loss") == history(whole, "loss")
    assert_equal_weights(cut, whole)


@pytest.mark.slow
def test_zero3_killed_at_a_step_resumes_to_the_same_weights(recipe, tmp_path):
    pytest.importorskip("deepspeed")
    words = [recipe, "--deepspeed", str(Path(recipe).with_name("zero3.json"))]
    words += ["--load_best_model_at_end", "false"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch(2, [*words, "--output_dir", str(whole)])
    launch(2, [*words, "--output_dir", str(cut)], kill="training_step:5")
    assert not (cut / "model.safetensors").exists()
    launch(2, [*words, "--output_dir", str(cut), "--resume_from_checkpoint", "auto"])
    assert history(cut, "loss") == history(whole, "loss")
    assert_equal_weights(cut, whole)
    # an ordinary folder, which opens without DeepSpeed and scores as training said
    assert all(name.startswith(("encoder.", "linear.")) for name in weights_of(whole))
    assert not [name for name in weights_of(whole) if name.endswith(("gamma", "beta"))]
    model = SetEncoderForReranking.from_pretrained(whole).eval()
    tokenizer = SetEncoderTokenizer.from_pretrained(whole)
    lists = EvaluationLists(ListwiseSamples.open(Path(recipe).with_name("one")), tokenizer)
    collator, losses = ListwiseCollator(tokenizer), []
    for number in range(len(lists)):
        batch = collator([lists[number]])
        labels = batch.pop("labels")
        with torch.no_grad():
            losses.append(RankNetLoss()(model(**batch).logits, labels).item())
    results = json.loads((whole / "results.json").read_text())
    assert results["eval_one_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, "lora"])
def test_zero3_processes_work_through_different_numbers_of_chunks(recipe, tmp_path, peft):
    pytest.importorskip("deepspeed")
    words = [recipe, "--hidden_dropout", "0", "--attention_dropout", "0", "--load_best_model_at_end", "false"]
    words += ["--max_steps", "2"]
    if peft is not None:  # without [INT] nothing is trained below the first layer
        words += ["--peft", peft, "--interaction", "cls"]
    train([*words, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "one")])
    words += ["--deepspeed", str(Path(recipe).with_name("zero3.json"))]
    words += ["--gradient_checkpointing", "true"] if peft is None else []  # which gives the first layer a gradient
    launch(2, [*words, "--max_tokens_per_chunk", "40", "--output_dir", str(tmp_path / "two")])
    one, two = tmp_path / "one", tmp_path / "two"
    for figure in ("eval_one_loss", "eval_two_loss"):
        assert history(two, figure) == pytest.approx(history(one, figure), rel=1e-3)
    assert history(two, "loss") == pytest.approx(history(one, "loss"), rel=1e-3)
    if peft is not None:
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (two, one))
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], atol=5e-4, rtol=0, msg=lambda said, n=name: f"{n}: {said}")
        return
    card = (two / "README.md").read_text()
    weights = sum(weight.numel() for weight in weights_of(two).values())
    assert f"{weights:,} of {weights:,} weights were trained" in card


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    for step in (2, 4, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "shards").mkdir(parents=True)
        (checkpoint / "shards" / "weights").write_bytes(b"1234")
        seal(checkpoint)
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", [])
    (tmp_path / "checkpoint-10" / "shards" / "weights").write_bytes(b"12")
    (tmp_path / "checkpoint-4" / "files.json").unlink()
    assert missing_files(tmp_path / "checkpoint-10") == ["shards/weights"]
    expected = (tmp_path / "checkpoint-2", [tmp_path / "checkpoint-10", tmp_path / "checkpoint-4"])
    assert last_checkpoint(tmp_path) == expected
    rotate(tmp_path, 1, {tmp_path / "checkpoint-2"})
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert last_checkpoint(tmp_path / "nowhere") == (None, [])


def test_what_is_being_uploaded_is_not_rotated_away(tmp_path):
    class Push:
        def is_done(self):
            return False

    trainer = HubTrainer.__new__(ListwiseTrainer)
    trainer.push_in_progress, trainer._pushed = Push(), frozenset({tmp_path / "checkpoint-1"})
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, 1, {tmp_path / "checkpoint-3", *trainer.uploading})
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    trainer.push_in_progress = None
    assert not trainer.uploading


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric_for_best_model", "nDCG@10"], "'nDCG@10' is not what 2 evaluation set.* one_nDCG@10, one_loss"),
        (
            ["--load_best_model_at_end", "false", "--eval_strategy", "no", "--early_stopping_patience", "1"],
            "eval_strat",
        ),
        (["--early_stopping_patience", "0"], "at least 1 evaluation, got 0"),
        (["--resume_from_checkpoint", "last"], "holds no checkpoint to resume from; .* auto"),
    ],
)
def test_what_cannot_be_judged_by_is_refused_before_a_step(recipe, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        train([recipe, "--output_dir", str(tmp_path / "out"), *words])


def test_a_training_that_stopped_early_goes_on_with_more_patience(recipe, tmp_path):
    words = [recipe, "--output_dir", str(tmp_path / "out"), "--learning_rate", "0", "--max_steps", "8"]
    steps = []
    for patience in (1, 1, 2):
        resumed = ["--resume_from_checkpoint", "last"] if steps else []
        train([*words, "--early_stopping_patience", str(patience), *resumed])
        steps.append(json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"])
    assert steps[0] == steps[1] < steps[2] < 8


def test_auto_starts_where_there_is_nothing_to_lose_only(recipe, tmp_path):
    from setenc_hf.train import empty_output, parse, prepare_output

    output = tmp_path / "out"
    _, data, training = parse([recipe, "--output_dir", str(output), "--resume_from_checkpoint", "auto"])
    (output / ".partial" / "checkpoint-2").mkdir(parents=True)
    assert prepare_output(data, training) is None
    assert output.exists()
    empty_output(training, [])
    assert not output.exists()
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds an earlier training"):
        prepare_output(data, training)
    assert (output / "thesis.txt").exists()

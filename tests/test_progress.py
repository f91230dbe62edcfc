"""What the log, the bar and the picture of a training say, and what a dry run says before it."""

import builtins
import logging
import time
from types import SimpleNamespace

import pytest
import torch

from data_prep.build_samples import main as build_samples
from setenc_hf.dry_run import count_steps, estimate_memory, measure_tokens
from setenc_hf.errors import InputError
from setenc_hf.lists import EvaluationLists, ListwiseCollator
from setenc_hf.progress import CurvesCallback, TrainingRecord, draw_curves, pairs_ordered
from setenc_hf.samples import IGNORE_LABEL, ListwiseSamples
from setenc_hf.tokens import SampleTokens
from setenc_hf.train import main as train
from small_collection import make_collection
from test_training import make_trainer, recipe, samples  # noqa: F401

X = IGNORE_LABEL


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pairs_ordered_right():
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, -torch.inf]])
    labels = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, X]])
    assert pairs_ordered(scores, labels).tolist() == [2 * 2 + 1, 4]  # of 3 pairs 2, and half of 1
    assert pairs_ordered(scores[:, :1], torch.full((2, 1), X)).tolist() == [0, 0]


def test_the_record_adds_up_over_steps_and_processes():
    record, twice = TrainingRecord(), SimpleNamespace(num_processes=2, gather=lambda rows: torch.cat([rows, rows + 1]))
    assert record.read(twice) == {}
    for lengths in ([5, 7], [9, 3, 4]):
        size = len(lengths)
        batch = {"num_passages": torch.tensor([size]), "passage_lengths": torch.tensor(lengths)}
        batch["input_ids"] = torch.zeros(1, sum(lengths))
        order = torch.arange(size).float()[None]
        record.add(batch, order, order)
    record.started -= 10
    record.step_ended = time.perf_counter() - 8  # and then eight seconds of evaluation
    record.on_evaluate(None, None, None)
    figures = record.read(twice)
    lists, passages, tokens, pairs = 2 * 2 + 1, 2 * 5 + 1, 2 * 28 + 1, 2 * (1 + 3) + 1
    assert figures["passages_per_list"] == passages / lists
    assert figures["tokens_per_passage"] == tokens / passages
    assert figures["pairs_ordered"] == pytest.approx((pairs - 1 + 0.5) / pairs)
    assert figures["longest_passage"] == 10
    assert figures["lists_per_second"] == pytest.approx(lists / 2, rel=0.05)
    assert record.read(twice) == {}


def test_the_log_keeps_lengths_and_pairs(backbones, samples, tmp_path):  # noqa: F811
    trainer = make_trainer(backbones["bert"], samples, tmp_path, batch_size=2, steps=3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["passages_per_list"] == 6
        assert 5 < entry["tokens_per_passage"] <= entry["longest_passage"] <= 32
        assert 0 <= entry["pairs_ordered"] <= 1
        assert entry["passages_per_second"] == pytest.approx(6 * entry["lists_per_second"])
        assert entry["grad_norm"] > 0
    trainer.evaluate()
    assert "pairs_ordered" not in trainer.state.log_history[-1]


def test_curves_are_drawn_or_one_line_says_why_not(tmp_path, monkeypatch, caplog):
    history = [{"step": n, "loss": 1 / n, "pairs_ordered": 0.5} for n in range(1, 4)]
    history += [{"step": 3, "eval_a_nDCG@10": 0.4}, {"step": 3, "eval_b_nDCG@10": 0.3}]
    draw_curves(tmp_path / "new" / "curves.png", history)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["curves.png"]
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    args, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(is_world_process_zero=True, log_history=history)
    real = builtins.__import__

    def without_matplotlib(name, *rest, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    curves = CurvesCallback()
    with caplog.at_level(logging.INFO):
        curves.on_save(args, state, None)
        curves.on_train_end(args, state, None)
    assert [record.message for record in caplog.records] == [
        "No curves.png: matplotlib is not there (pip install 'setenc_hf[plot]')"
    ]
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("is_fast", [False, True])
def test_bfloat16_that_the_processor_only_emulates_is_warned_of(
    backbones,
    samples,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
    is_fast,
):
    monkeypatch.setattr("setenc_hf.train.is_bfloat16_fast", lambda device: is_fast)
    path = recipe(tmp_path, samples, backbones["bert"])
    train([path, "--dry-run"])
    train([path, "--dry-run", "--bf16", "true"])
    said = [record.getMessage() for record in caplog.records if record.name == "setenc_hf.train"]
    assert ["pass --bf16 false" in words for words in said] == [True] * (not is_fast)


def test_a_dry_run_says_what_a_training_would_take_and_writes_nothing(backbones, samples, tmp_path, capsys):  # noqa: F811
    path = recipe(tmp_path, samples, backbones["electra"], max_steps=-1, num_train_epochs=3)
    for folder in ("train", "dev"):
        for tokens in (samples / folder / "tokens").glob("*"):
            tokens.rename(tmp_path / f"{folder}-{tokens.name}")
    before = files(samples), files(tmp_path)
    assert train([path, "--dry-run"]) == {}
    printed = capsys.readouterr().out
    assert "steps     3 of 8 lists, 3.00 epochs" in printed
    assert "evaluate  6 lists of dev, depth 100" in printed
    assert "memory    about" in printed
    assert (files(samples), files(tmp_path)) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(InputError, match="holds an earlier training"):
        train([path, "--dry_run", "true"])
    train([path, "--dry_run", "true", "--overwrite_output"])
    assert (tmp_path / "out" / "kept").exists()


@pytest.mark.parametrize(("batch_size", "accumulation", "epochs"), [(1, 4, 2), (4, 1, 1.5), (2, 2, 1)])
def test_steps_are_those_that_training_takes(backbones, samples, tmp_path, batch_size, accumulation, epochs):  # noqa: F811
    args = {"num_train_epochs": epochs}
    trainer = make_trainer(backbones["bert"], samples, tmp_path, batch_size, -1, accumulation, args=args)
    trainer.train()
    assert count_steps(len(trainer.train_dataset), trainer.args)[0] == trainer.state.global_step


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_of_activations_is_near_what_is_kept(backbones, samples, tmp_path, dropout):  # noqa: F811
    changed = {"attention_dropout": dropout, "hidden_dropout": dropout}
    trainer = make_trainer(backbones["bert"], samples, tmp_path, batch_size=4, model=changed)
    model, collator = trainer.model.train(), ListwiseCollator(trainer.processing_class)
    batch = collator([trainer.train_dataset[(0, number)] for number in range(4)])
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch)
    tokens = measure_tokens(trainer.train_dataset, collator, 4)
    estimate = estimate_memory(model, trainer.args, batch["input_ids"].numel(), tokens.keys)
    assert output.logits.requires_grad
    assert 0.7 < estimate.activations / sum(kept.values()) < 1.4
    number = sum(weight.numel() for weight in model.parameters())
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (4 * number, 4 * number, 8 * number)
    for weight in model.parameters():  # as ZeRO-3 leaves them
        weight.ds_numel, weight.data = weight.numel(), torch.empty(0)
    assert estimate_memory(model, trainer.args, batch["input_ids"].numel(), tokens.keys) == estimate


def test_tokens_made_at_every_call_are_the_stored_ones(backbones, samples, tmp_path):  # noqa: F811
    tokenizer = make_trainer(backbones["bert"], samples, tmp_path).processing_class
    stored = ListwiseSamples.open(samples / "train")
    kept = SampleTokens.of(stored, tokenizer.backend)
    moved = ListwiseSamples(tmp_path, stored.samples, stored.corpus, stored.meta)
    made = SampleTokens.of(moved, tokenizer.backend, store=False)
    assert not (tmp_path / "tokens").exists()
    assert len(made.passages) == len(kept.passages)
    for row in range(len(kept.passages)):
        assert made.passages[row].tolist() == kept.passages[row].tolist()
    assert made.queries[0].tolist() == kept.queries[0].tolist()


def test_an_evaluation_list_without_a_retrieved_passage_is_left_out(backbones, samples, tmp_path):  # noqa: F811
    collection = make_collection(tmp_path / "collection")
    lines = ["q0 Q0 d1 1 2 t", "q0 Q0 d2 2 1 t", "q1 Q0 missing 1 2 t", "q2 Q0 missing 1 2 t", "q2 Q0 d3 2 1 t"]
    (tmp_path / "a.run").write_text("\n".join(lines) + "\n")
    (tmp_path / "qrels").write_text("q0 0 d1 1\nq1 0 d1 1\nq2 0 d4 1\n")
    build_samples(
        ["--run", str(tmp_path / "a.run"), "--collection", str(collection), "--labels", "relevance"]
        + ["--qrels", str(tmp_path / "qrels"), "--output", str(tmp_path / "samples"), "--add-relevant"]
    )
    tokenizer = make_trainer(backbones["bert"], samples, tmp_path).processing_class
    stored = ListwiseSamples.open(tmp_path / "samples")
    assert stored.best_ranks().tolist() == [1, 0, 2]
    lists = EvaluationLists(stored, tokenizer)
    assert [lists[number]["query_id"] for number in range(len(lists))] == ["q0", "q2"]
    assert lists[1]["doc_ids"] == ["d3"]
    assert lists.left_out == {"lists without a retrieved passage": 1}
    assert {qrel.query_id for qrel in lists.qrels} == {"q0", "q2"}
    assert len(EvaluationLists(stored, tokenizer, depth=1)) == 1


def test_lengths_beyond_the_positions_are_refused(backbones, samples, tmp_path):  # noqa: F811
    path = recipe(tmp_path, samples, backbones["roberta"], passage_length=52)
    message = "`query_length` 8 and `passage_length` 52 need 64 positions with 4 special tokens, but the roberta "
    with pytest.raises(InputError, match=message + "backbone has 63: lower `passage_length` to 51 or less"):
        train([path, "--dry-run"])
    train([path, "--dry-run", "--passage_length", "51"])

"""Training: what a step sees, what a loss is divided by, and that a resumed run is the same run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import ir_measures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from data_prep.build_samples import main as build_samples
from setenc_hf.arguments import ModelArguments
from setenc_hf.distributed import check_launch
from setenc_hf.errors import InputError
from setenc_hf.lists import EpochSampler, EvaluationLists, ListwiseCollator, TrainingLists
from setenc_hf.losses import RankNetLoss
from setenc_hf.measures import compare, mean, parse_measures, per_query, run_scores
from setenc_hf.modeling import SetEncoderForReranking
from setenc_hf.samples import IGNORE_LABEL, ListwiseSamples
from setenc_hf.scoring import QueryPassages, score_lists
from setenc_hf.tokens import SampleTokens
from setenc_hf.train import load_model
from setenc_hf.train import main as train
from setenc_hf.trainer import ListwiseTrainer, ListwiseTrainingArguments
from setenc_hf.trec import read_lists, write_run
from small_collection import make_collection, make_run, make_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    make_samples(folder, "train")
    make_samples(folder, "dev", seed=7, has_own_queries=True)
    return folder


def make_trainer(backbone, samples, tmp_path, batch_size=1, steps=4, accumulation=1, **kwargs):
    torch.manual_seed(0)
    changed = kwargs.pop("model", {})
    model = SetEncoderForReranking.from_pretrained(backbone, query_length=8, passage_length=20, **changed)
    args = ListwiseTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=kwargs.pop("max_steps", steps),
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"learning_rate": 1e-3, "save_strategy": "no", "measures": ["nDCG@10", "MRR@10"], **kwargs.pop("args", {})},
    )
    stored = ListwiseSamples.open(samples / "train")
    return ListwiseTrainer(
        model=model,
        args=args,
        loss=RankNetLoss(),
        train_dataset=TrainingLists([stored], model.tokenizer, "random", 6),
        eval_dataset=EvaluationLists(ListwiseSamples.open(samples / "dev"), model.tokenizer),
        processing_class=model.tokenizer,
        **kwargs,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_lists_are_drawn_anew_each_epoch_and_the_same_again(backbones, samples):
    tokenizer = SetEncoderForReranking.from_pretrained(backbones["bert"]).tokenizer
    lists = TrainingLists([ListwiseSamples.open(samples / "train")], tokenizer, "random", 4)
    first, again, later = lists[(0, 3)], lists[(0, 3)], lists[(1, 3)]
    assert [ids.tolist() for ids in first["passage_ids"]] == [ids.tolist() for ids in again["passage_ids"]]
    assert [ids.tolist() for ids in first["passage_ids"]] != [ids.tolist() for ids in later["passage_ids"]]
    sample = lists.samples[0].samples[3]
    texts = lists.samples[0].corpus[sample["passages"]]["text"]
    labels = {text: label for text, label in zip(texts, sample["labels"])}
    encoded = {tuple(tokenizer.encode_passages([text])[0]): label for text, label in labels.items()}
    assert [encoded[tuple(ids.tolist())] for ids in first["passage_ids"]] == first["labels"].tolist()


def test_every_epoch_has_an_order_of_its_own(backbones, samples):
    tokenizer = SetEncoderForReranking.from_pretrained(backbones["bert"]).tokenizer
    lists = TrainingLists([ListwiseSamples.open(samples / "train")], tokenizer, "random", 4)
    orders = []
    for epoch in (0, 1, 0):
        lists.set_epoch(epoch)
        orders.append(list(EpochSampler(lists)))
        assert sorted(orders[-1]) == [(epoch, number) for number in range(6)]
    assert orders[0] == orders[2]
    assert [number for _, number in orders[0]] != [number for _, number in orders[1]]


def test_lists_that_teach_nothing_are_left_out_and_counted(backbones, samples, tmp_path):
    tokenizer = SetEncoderForReranking.from_pretrained(backbones["bert"]).tokenizer
    collection = make_collection(tmp_path / "collection")
    ranked = {"q0": ["d1"], "q1": ["d1", "d2"], "q2": ["d1", "d2"], "q3": ["d2", "d3", "d1"]}
    lines = [f"{q} Q0 {d} {rank} {-rank} t\n" for q, doc_ids in ranked.items() for rank, d in enumerate(doc_ids, 1)]
    (tmp_path / "a.run").write_text("".join(lines))
    (tmp_path / "qrels").write_text("q0 0 d1 1\nq1 0 d1 0\nq2 0 d1 1\nq3 0 d1 1\n")
    build_samples(
        ["--run", str(tmp_path / "a.run"), "--collection", str(collection), "--labels", "relevance"]
        + ["--qrels", str(tmp_path / "qrels"), "--output", str(tmp_path / "samples")]
    )
    lists = TrainingLists([ListwiseSamples.open(tmp_path / "samples")], tokenizer, "single_relevant", 4)
    assert len(lists) == 2
    assert lists.left_out == {"lists of fewer than 2 passages": 1, "lists without a relevant passage": 1}
    cut = TrainingLists(lists.samples, tokenizer, "single_relevant", 4, depth=2)  # q3's relevant passage lies below
    assert [len(cut[number]["labels"]) for number in range(len(cut))] == [2]
    assert cut.left_out == {
        "lists of fewer than 2 passages down to rank 2": 1,
        "lists without a relevant passage down to rank 2": 2,
    }
    with pytest.raises(InputError, match="is one of top, random"):
        TrainingLists([], tokenizer, "best", 4)


def test_tokens_are_made_once(backbones, samples, monkeypatch):
    tokenizer = SetEncoderForReranking.from_pretrained(backbones["bert"]).tokenizer
    stored = ListwiseSamples.open(samples / "train")
    tokens = SampleTokens.of(stored, tokenizer.backend)
    assert len(tokens.passages) == len(stored.corpus)
    for row, text in enumerate(stored.corpus["text"]):
        assert tokens.passages[row].tolist() == tokenizer.encode_passages([text])[0]
    monkeypatch.setattr("setenc_hf.tokens.write_tokens", None)
    SampleTokens.of(stored, tokenizer.backend)


def test_the_collator_aligns_labels_and_takes_text_or_tokens(backbones):
    tokenizer = SetEncoderForReranking.from_pretrained(backbones["bert"]).tokenizer
    texts = [{"query": "cat", "passages": ["lamp", "blue river"], "labels": [1.0, 0.0]},
             {"query": "dog", "passages": ["a"], "labels": [2.0]}]  # fmt: skip
    ids = [
        {
            "query_ids": np.array(tokenizer.encode_queries([s["query"]])[0], dtype=np.int32),
            "passage_ids": [np.array(ids, dtype=np.int32) for ids in tokenizer.encode_passages(s["passages"])],
            "labels": np.array(s["labels"], dtype=np.float32),
        }
        for s in texts
    ]
    collator = ListwiseCollator(tokenizer)
    by_text, by_ids = collator(texts), collator(ids)
    assert by_text.keys() == by_ids.keys()
    assert all(torch.equal(by_text[name], by_ids[name]) for name in by_text)
    assert by_text["labels"].tolist() == [[1.0, 0.0], [2.0, IGNORE_LABEL]]
    with pytest.raises(ValueError, match="2 passages has 1 labels"):
        collator([{**texts[0], "labels": [1.0]}])


def test_accumulating_four_steps_equals_one_batch_of_four(backbones, samples, tmp_path):
    weights = []
    for batch_size, accumulation in ((1, 4), (4, 1)):
        trainer = make_trainer(
            backbones["bert"], samples, tmp_path, batch_size, steps=2, accumulation=accumulation,
            model={"attention_dropout": 0.0, "hidden_dropout": 0.0}, args={"optim": "sgd", "learning_rate": 0.1},
        )  # fmt: skip
        trainer.train()
        weights.append((losses(trainer), trainer.model.linear.weight.detach().clone()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-4)
    torch.testing.assert_close(weights[0][1], weights[1][1], atol=1e-5, rtol=1e-4)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_resumed_run_is_the_uninterrupted_run(backbones, samples, tmp_path, workers, persistent):
    args = {"save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": workers}
    args["dataloader_persistent_workers"] = persistent  # such workers never hear of a new epoch
    # torch draws a seed where workers start, so that with persistent ones the dropout of a resumed run is another
    model = {"attention_dropout": 0.0, "hidden_dropout": 0.0} if persistent else {}

    def make(name, **kwargs):
        return make_trainer(
            backbones["bert"], samples, tmp_path / name, max_steps=9, args=args, model={**model}, **kwargs
        )

    whole = make("whole")
    whole.train()
    first = make("cut", callbacks=[StopAt(5)])
    first.train()
    assert len(losses(first)) == 5
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "out" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_a_measure_whose_package_is_absent_is_refused_by_its_name(monkeypatch):
    absent = next(one for one in ir_measures.DefaultPipeline.providers if one.NAME == "pyndeval")
    monkeypatch.setattr(type(absent), "is_available", lambda self: False)
    with pytest.raises(InputError, match=r"'alpha_nDCG@10' needs a package .*: pip install ir-measures\[pyndeval\]"):
        parse_measures(["nDCG@10", "alpha_nDCG@10"])


def test_evaluation_reranks_whole_lists_and_measures_over_all_judgements(backbones, samples, tmp_path):
    trainer = make_trainer(backbones["bert"], samples, tmp_path)
    metrics = trainer.evaluate()
    dataset = trainer.eval_dataset
    stored, run = dataset.samples, {}
    for row in stored.samples:
        places = [place for place, rank in enumerate(row["ranks"]) if rank > 0]
        doc_ids = stored.doc_ids([row["passages"][place] for place in places])
        texts = [stored.corpus[row["passages"][place]]["text"] for place in places]
        (scored,) = score_lists(
            trainer.model, trainer.processing_class, [QueryPassages(row["query_id"], row["query"], doc_ids, texts)]
        )
        run[row["query_id"]] = dict(zip(scored.doc_ids, scored.scores))
        assert len(scored.scores) == 12
    qrels = [ir_measures.Qrel(q.query_id, q.doc_id, q.relevance) for q in stored.qrels()]
    measures = parse_measures(["nDCG@10", "MRR@10"])
    expected = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    for name, measure in measures.items():
        assert metrics[f"eval_{name}"] == pytest.approx(expected[measure], abs=1e-9)
    assert math.isfinite(metrics["eval_loss"])
    named = trainer.evaluate({"a": dataset, "b": dataset})
    assert named["eval_a_nDCG@10"] == named["eval_b_nDCG@10"] == metrics["eval_nDCG@10"]


def test_a_training_that_has_diverged_is_not_measured_as_the_first_stage(backbones, samples, tmp_path):
    trainer = make_trainer(backbones["bert"], samples, tmp_path)
    torch.nn.init.constant_(trainer.model.linear.weight, float("nan"))
    with pytest.raises(InputError, match="query 'q.*': the scores are not finite after step 0, .* has diverged"):
        trainer.evaluate()


def test_ties_are_measured_as_a_written_run_has_them(backbones, samples, tmp_path):
    trainer = make_trainer(backbones["bert"], samples, tmp_path)
    torch.nn.init.zeros_(trainer.model.linear.weight)  # all passages of a list have one score
    dataset = trainer.eval_dataset
    lists = [dataset[number] for number in range(len(dataset))]
    scored = [(row["query_id"], [(doc_id, 0.0) for doc_id in row["doc_ids"]]) for row in lists]
    write_run(tmp_path / "tied.run", scored, "tied")
    expected = per_query(parse_measures(["nDCG@10"]), dataset.qrels, run_scores(read_lists(tmp_path / "tied.run")))
    assert trainer.evaluate()["eval_nDCG@10"] == pytest.approx(mean(expected["nDCG@10"]), abs=1e-12)
    # the data can tell this order from the one by name
    by_name = per_query(parse_measures(["nDCG@10"]), dataset.qrels, {query_id: dict(row) for query_id, row in scored})
    assert mean(by_name["nDCG@10"]) != pytest.approx(mean(expected["nDCG@10"]), abs=1e-3)


def recipe(tmp_path, samples, backbone, **fields):
    path = tmp_path / "recipe.json"
    values = {
        "model": backbone,
        "passage_length": 20,
        "query_length": 8,
        "train_samples": [str(samples / "train")],
        "eval_samples": [str(samples / "dev")],
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "learning_rate": "1e-4",
        "sample_size": 6,
        "report_to": "none",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        **fields,
    }
    path.write_text(json.dumps(values))
    return str(path)


def test_the_command_trains_from_a_recipe_that_the_command_line_overrides(backbones, samples, tmp_path, capsys):
    path = recipe(
        tmp_path, samples, backbones["electra"], load_best_model_at_end=True, metric_for_best_model="nDCG@10",
        early_stopping_patience=1, report_to="tensorboard",
    )  # fmt: skip
    metrics = train([path, "--max_steps", "6", "--loss", "listnet", "--save-steps", "2"])
    printed = capsys.readouterr().out
    assert "loss listnet" in printed
    output = tmp_path / "out"
    saved = json.loads((output / "recipe.json").read_text())
    assert (saved["learning_rate"], saved["max_steps"], saved["loss"]) == (1e-4, 6, "listnet")
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["best_metric"] == metrics["eval_nDCG@10"]
    assert list(output.rglob("events.out.tfevents*"))
    assert not (output / "training_args.bin").exists()
    model = SetEncoderForReranking.from_pretrained(output)
    assert model.config.passage_length == 20
    with pytest.raises(InputError, match="holds an earlier training"):
        train([path])
    # stage 2 starts from what stage 1 saved
    second = recipe(tmp_path, samples, str(output), output_dir=str(tmp_path / "two"))
    train([second, "--max_steps", "1", "--eval_strategy", "no"])
    assert (tmp_path / "two" / "model.safetensors").exists()


def test_the_command_resumes_where_an_interrupted_training_stopped(backbones, samples, tmp_path, monkeypatch):
    path = recipe(tmp_path, samples, backbones["bert"], eval_strategy="no", max_steps=5)
    train([path, "--output_dir", str(tmp_path / "whole")])

    def interrupt(self, *_, **__):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *_, **__)

    step = ListwiseTrainer.training_step
    monkeypatch.setattr(ListwiseTrainer, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train([path])
    monkeypatch.setattr(ListwiseTrainer, "training_step", step)
    train([path, "--resume_from_checkpoint", "last"])
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "out")]
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "out")]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], abs=1e-6)
    train([path, "--resume_from_checkpoint", "last"])  # nothing is left to do, and what was done is not forgotten
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["train_seconds"] > 0.2 * results[1]["train_seconds"] > 0.001
    assert again["train_loss"] == results[1]["train_loss"]
    histories = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 5


@pytest.mark.parametrize(
    ("fields", "words", "message"),
    [
        ({"learning_rat": 1}, [], r"recipe.json: no field 'learning_rat'; did you mean 'learning_rate'?"),
        ({"learning_rate": "fast"}, [], r"recipe.json: argument --learning_rate.*invalid float value: 'fast'"),
        ({"max_steps": 1.5}, [], r"recipe.json: argument --max_steps.*invalid int value: '1.5'"),
        ({"loss": "ranknett"}, [], r"loss 'ranknett': no such loss; did you mean 'ranknet'?"),
        (
            {"loss": ["ranknet", "2 * infonce(temprature=2)"]},
            [],
            r"no option 'temprature'; did you mean 'temperature'?",
        ),
        ({}, ["--sample-siz", "3"], r"--sample-siz: no such argument; did you mean 'sample_size'?"),
        ({"sample_size": 1}, [], "`sample_size` must be at least 2"),
        ({"measures": ["nDCG@ten"]}, [], "'nDCG@ten' is no measure"),
        ({"model": "/nowhere/at/all"}, [], "/nowhere/at/all: no such folder"),
        ({"train_samples": ["/nowhere"]}, [], "/nowhere: no listwise samples"),
        ({"resume_from_checkpoint": "last"}, [], "holds no checkpoint to resume from"),
        ({"train_sampling_strategy": "sequential"}, [], "`train_sampling_strategy` would change nothing"),
        ({"label_smoothing_factor": 0.1}, [], "`label_smoothing_factor` would change nothing"),
        ({"bf16_full_eval": True}, [], "`bf16_full_eval` would change nothing"),
        ({"per_device_eval_batch_size": 4}, [], "go together by `max_tokens_per_batch`; leave it out"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(backbones, samples, tmp_path, fields, words, message):
    path = recipe(tmp_path, samples, backbones["bert"], **fields)
    with pytest.raises(InputError, match=message.replace("?", r"\?")) as error:
        train([path, *words])
    assert "\n" not in " ".join(str(error.value).split())
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_an_earlier_training_is_removed_only_when_the_next_one_can_begin(backbones, samples, tmp_path):
    path = recipe(tmp_path, samples, backbones["bert"], max_steps=1, eval_strategy="no", save_strategy="no")
    train([path])
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = [path, "--overwrite_output", "true", "--learning_rate", "1e-2"]
    for words, message in (
        (["--train_samples", str(tmp_path / "typo")], "no listwise samples here"),
        (["--model", str(tmp_path / "out")], "out: holds .*out, which this training needs"),
        (["--eval_strategy", "steps", "--eval_steps", "1", "--eval_samples"], "expected at least one argument"),
        (["--output_dir", str(samples)], "holds .*train, which this training needs"),
    ):
        with pytest.raises(InputError, match=message):
            train([*again, *words])
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
        assert (samples / "train" / "meta.json").exists()
    train(again)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != weights


def test_going_on_from_a_folder_loses_no_other_training(backbones, samples, tmp_path):
    words = ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3"]
    words += ["--load_best_model_at_end", "false", "--save_total_limit", "9"]
    path = recipe(tmp_path, samples, backbones["bert"])
    train([path, *words])
    mine, others = tmp_path / "out", tmp_path / "others"
    train([path, *words, "--output_dir", str(others)])
    first = ["--resume_from_checkpoint", str(mine / "checkpoint-1")]
    with pytest.raises(InputError, match="others: holds an earlier training"):
        train([path, *words, *first, "--output_dir", str(others)])
    with pytest.raises(InputError, match="checkpoint-2, checkpoint-3 would be taken for checkpoints of what goes on"):
        train([path, *words, *first])
    assert {path.name for path in mine.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    train([path, *words, *first, "--max_steps", "2", "--overwrite_output", "true"])
    assert {path.name for path in mine.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    train([path, *words, *first, "--output_dir", str(others), "--overwrite_output", "true"])
    assert {path.name for path in others.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    # on another disk, and a later one that is being copied
    (mine / "checkpoint-2").rename(tmp_path / "far")
    (mine / "checkpoint-2").symlink_to(tmp_path / "far")
    (mine / "checkpoint-9").mkdir()
    train([path, *words, "--resume_from_checkpoint", "last"])
    assert {path.name for path in mine.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3, 9)}


def test_a_hub_that_refuses_costs_no_earlier_training(backbones, samples, tmp_path, monkeypatch):
    path = recipe(tmp_path, samples, backbones["bert"], max_steps=1, eval_strategy="no", save_strategy="no")
    train([path])
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()

    def refuse(self):
        raise OSError("401: the token has expired")

    monkeypatch.setattr("setenc_hf.trainer.ListwiseTrainer.init_hf_repo", refuse)
    with pytest.raises(OSError, match="expired"):
        train([path, "--overwrite_output", "true", "--push_to_hub", "true"])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_trained_in_float32_however_they_are_stored(backbones, tmp_path, dtype):
    model = SetEncoderForReranking.from_pretrained(backbones["bert"], dtype=dtype, query_length=8, passage_length=20)
    model.save_pretrained(tmp_path / "half")
    opened, _ = load_model(ModelArguments(model=str(tmp_path / "half")))
    assert {weight.dtype for weight in opened.parameters()} == {torch.float32}
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(weight, stored[name].float()) for name, weight in opened.state_dict().items())


def test_labels_stay_what_they_are_under_deepspeed(backbones, samples, tmp_path):
    trainer = make_trainer(backbones["bert"], samples, tmp_path)
    trainer.is_deepspeed_enabled = True
    labels = torch.tensor([[100.3, -100.1, -100.0]])
    assert torch.equal(trainer._prepare_input({"labels": labels})["labels"], labels)


def test_a_file_of_weights_that_was_cut_short_is_one_line(backbones, tmp_path):
    model = SetEncoderForReranking.from_pretrained(backbones["bert"], query_length=8, passage_length=20)
    model.save_pretrained(tmp_path / "cut")
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cut' cannot be used: .*"):
        load_model(ModelArguments(model=str(tmp_path / "cut")))


def test_one_process_takes_one_of_several_gpus_and_says_so(caplog):
    training = SimpleNamespace(n_gpu=4, _n_gpu=4, world_size=1, device=torch.device("cuda:0"))
    check_launch(training)
    assert training._n_gpu == 1
    assert "4 GPUs are here and one is used" in caplog.text


def test_a_report_that_cannot_be_had_is_refused_before_anything_is_removed(backbones, samples, tmp_path, monkeypatch):
    path = recipe(tmp_path, samples, backbones["bert"], report_to="tensorboard", overwrite_output=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    for words in ([], ["--dry-run"]):
        with pytest.raises(InputError, match="`report_to` tensorboard cannot be had"):
            train([path, *words])
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_evaluation_without_samples_is_refused(backbones, samples, tmp_path):
    path = recipe(tmp_path, samples, backbones["bert"], eval_samples=None)
    for words in ([], ["--dry-run"]):
        with pytest.raises(InputError, match="`eval_strategy` steps needs `eval_samples`"):
            train([path, *words])


def test_the_saved_recipe_repeats_the_training(backbones, samples, tmp_path):
    changed = {
        "lr_scheduler_kwargs": {"num_cycles": 0.4},
        "lr_scheduler_type": "cosine",
        "loss": ["listnet", "ranknet"],
    }
    path = recipe(tmp_path, samples, backbones["bert"], eval_strategy="no", **changed)
    train([path, "--max_steps", "2", "--learning-rate", "1e-2", "--warmup_steps=1", "--overwrite_output", "true"])
    saved = json.loads((tmp_path / "out/recipe.json").read_text())
    assert (saved["loss"], saved["warmup_steps"], saved["max_steps"]) == ("listnet + ranknet", 1, 2)
    assert not {"overwrite_output", "hub_token", "weight_decay"} & saved.keys()
    train([str(tmp_path / "out/recipe.json"), "--output_dir", str(tmp_path / "again")])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_a_trained_model_is_given_an_interaction_token(backbones, samples, tmp_path):
    for family in ("bert", "electra"):
        path = recipe(tmp_path, samples, backbones[family], interaction="cls", max_steps=1, eval_strategy="no")
        train([path, "--output_dir", str(tmp_path / family)])
        model = SetEncoderForReranking.from_pretrained(tmp_path / family, interaction="int")
        template = model.tokenizer.template
        rows = model.get_input_embeddings().weight
        assert template.int_id not in (None, template.cls_id)
        assert torch.equal(rows[template.int_id], rows[template.cls_id])
        assert len(model.rank("blue river", ["lamp", "cat dog"])) == 2
        words = [
            "--model",
            str(tmp_path / family),
            "--interaction",
            "int",
            "--output_dir",
            str(tmp_path / f"{family}-int"),
        ]
        train([path, *words])
        assert SetEncoderForReranking.from_pretrained(tmp_path / f"{family}-int").config.interaction == "int"


def test_labels_that_the_loss_cannot_use_and_shared_queries_are_refused(backbones, samples, tmp_path):
    collection = make_collection(tmp_path / "collection")
    words = ["--collection", str(collection), "--labels", "rank", "--output", str(tmp_path / "teacher")]
    build_samples(["--run", str(make_run(tmp_path)), *words])
    path = recipe(tmp_path, samples, backbones["bert"], train_samples=[str(tmp_path / "teacher")], loss="infonce")
    with pytest.raises(InputError, match="'infonce' needs labels of relevance, .*teacher has labels of rank"):
        train([path])
    mixture = ["lambdaloss(weighting=none)", "0.5 * approx_ndcg"]
    path = recipe(tmp_path, samples, backbones["bert"], train_samples=[str(tmp_path / "teacher")], loss=mixture)
    message = r"loss 'lambdaloss\(weighting=none\) \+ 0.5 \* approx_ndcg' needs labels of relevance, .* labels of rank"
    with pytest.raises(InputError, match=message):
        train([path])
    words = ["--loss", "ranknet", "0.5 * approx_ndcg(gain=linear)", "--eval_strategy", "no", "--max_steps", "1"]
    train([path, *words, "--output_dir", str(tmp_path / "mixed")])
    path = recipe(tmp_path, samples, backbones["bert"], eval_samples=[str(samples / "train")])
    with pytest.raises(InputError, match="shares 6 queries with the training samples"):
        train([path])


def test_comparison_of_runs(monkeypatch):
    run, baseline = {f"q{n}": 0.5 + 0.1 * (n % 3) for n in range(30)}, {f"q{n}": 0.5 for n in range(30)}
    compared = compare(run, baseline)
    assert compared.difference == pytest.approx(0.1)
    assert 0.05 < compared.low < 0.1 < compared.high < 0.15
    assert (compared.wins, compared.losses) == (20, 0)
    assert compared.p_value < 0.001
    assert compare(baseline, baseline).p_value == 1.0
    monkeypatch.setattr("setenc_hf.measures.DRAWN_AT_A_TIME", 77)  # in blocks of two draws: the same ones
    assert compare(run, baseline) == compared


def test_every_recipe_parses():
    from setenc_hf.train import parse

    folder = Path(__file__).parents[1] / "recipes"
    recipes = sorted(folder.glob("*.json"))
    assert len(recipes) >= 6
    for path in (folder / "deepspeed").glob("*.json"):
        stage = json.loads(path.read_text())["zero_optimization"]["stage"]
        assert path.stem.removesuffix("-offload") == f"zero{stage}"
    for path in recipes:
        parse([str(path), "--bf16", "false"])

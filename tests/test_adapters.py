"""Adapters: what is trained is saved, and comes back to the bit, on every backbone and in a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, pipeline

from conftest import FAMILIES
from data_prep.build_samples import main as build_samples
from setenc_hf.adapters import ADAPTER, add_adapter, merge, methods
from setenc_hf.arguments import ModelArguments
from setenc_hf.errors import InputError
from setenc_hf.merge_adapter import main as merge_adapter
from setenc_hf.modeling import SetEncoderForReranking
from setenc_hf.rerank import main as rerank
from setenc_hf.train import main as train
from small_collection import make_collection, make_run

ROOT = Path(__file__).parents[1]
QUERY, PASSAGES = "cat life", ["the cat of water", "a dog", "green paper lamp in stone"]
FRESH = """
import sys, torch
from setenc_hf import SetEncoderForReranking
torch.manual_seed(int(sys.argv[1]))
for folder in sys.argv[2:]:
    ranked = SetEncoderForReranking.from_pretrained(folder).rank("cat life", {passages!r})
    print("scores", *(row["score"].hex() for row in sorted(ranked, key=lambda row: row["index"])))
"""


def scores(model):
    return [row["score"] for row in sorted(model.rank(QUERY, PASSAGES), key=lambda row: row["index"])]


def trained(base, method="lora", settings=None, seed=0):
    """An adapter after three steps."""
    torch.manual_seed(seed)
    model = SetEncoderForReranking.from_pretrained(base, query_length=8, passage_length=20)
    adapter = add_adapter(model, method, settings)
    optimizer = torch.optim.SGD([weight for weight in adapter.parameters() if weight.requires_grad], lr=0.05)
    batch = model.tokenizer(QUERY, PASSAGES)
    for _ in range(3):
        loss = (adapter(**batch).logits * torch.tensor([[1.0, -1.0, 0.5]])).sum() + adapter.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter.eval()


def test_the_row_of_int_is_trained_whether_the_tokenizer_was_opened_or_not(backbones, tmp_path):
    model = SetEncoderForReranking.from_pretrained(backbones["bert"], query_length=8, passage_length=20)
    model.save_pretrained(tmp_path / "saved")
    adapter = add_adapter(SetEncoderForReranking.from_pretrained(str(tmp_path / "saved")), "lora")
    trained = [name for name, weight in adapter.named_parameters() if weight.requires_grad]
    assert any("trainable_tokens_delta" in name for name in trained)


@pytest.fixture(scope="module")
def adapters(backbones, tmp_path_factory):
    """For every family: the folder of an adapter, the scores it had, and those of a fresh process."""
    folders, expected = {}, {}
    for family in FAMILIES:
        adapter = trained(backbones[family])
        folders[family] = str(tmp_path_factory.mktemp(family))
        expected[family] = scores(adapter.get_base_model())
        adapter.save_pretrained(folders[family])
    script = [sys.executable, "-c", FRESH.format(passages=PASSAGES)]
    done = subprocess.run(
        [*script, "1", *folders.values()], capture_output=True, text=True, check=True, cwd=ROOT, timeout=300
    )
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("scores")]
    fresh = {family: [float.fromhex(word) for word in line] for family, line in zip(FAMILIES, lines)}
    return folders, expected, fresh


def test_an_adapter_comes_back_to_the_bit_in_a_fresh_process(family, adapters):
    folders, expected, fresh = adapters
    assert fresh[family] == expected[family]
    torch.manual_seed(2)  # whatever the seed: neither head nor [INT] is drawn again
    assert scores(SetEncoderForReranking.from_pretrained(folders[family])) == expected[family]
    assert len(set(expected[family])) == 3


def test_the_head_and_the_row_of_int_are_trained_and_nothing_else_of_the_base(family, backbones, adapters):
    folders = adapters[0]
    torch.manual_seed(0)
    base = SetEncoderForReranking.from_pretrained(backbones[family], query_length=8, passage_length=20)
    opened = SetEncoderForReranking.from_pretrained(folders[family])
    row = base.tokenizer.template.int_id
    before, after = base.get_input_embeddings().weight, opened.get_input_embeddings().weight
    assert (before[:row] != after[:row]).sum() == 0
    assert not torch.equal(before[row], after[row])
    assert not torch.equal(base.linear.weight, opened.linear.weight)
    stored = load_file(Path(folders[family]) / "adapter_model.safetensors")
    assert not any("linear.lora" in name for name in stored)  # the head is trained whole
    in_encoder = sum(isinstance(module, torch.nn.Linear) for module in base.encoder.modules())
    assert sum("lora_A" in name for name in stored) == in_encoder
    kept = {name: weight for name, weight in opened.state_dict().items() if "base_layer.weight" in name}
    for name, weight in kept.items():
        if "embed" not in name:
            assert torch.equal(weight, base.state_dict()[name.replace(".base_layer", "")])
    assert sorted(path.name for path in Path(folders[family]).iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["adalora", "ia3", "ln_tuning", "loha"])
def test_other_methods_come_back_and_merge(method, backbones, tmp_path):
    adapter = trained(backbones["modernbert"], method)
    expected = scores(adapter.get_base_model())
    adapter.save_pretrained(tmp_path)
    opened = SetEncoderForReranking.from_pretrained(str(tmp_path))
    assert scores(opened) == expected
    merged = merge(opened)
    assert scores(merged) == pytest.approx(expected, abs=2e-4)
    row = merged.tokenizer.template.int_id
    plain = SetEncoderForReranking.from_pretrained(backbones["modernbert"])
    assert not torch.equal(merged.get_input_embeddings().weight[row], plain.get_input_embeddings().weight[row])


def test_an_adapter_merges_into_an_ordinary_folder(adapters, tmp_path, capsys):
    folders, expected, _ = adapters
    merge_adapter([folders["bert"], str(tmp_path / "merged")])
    assert "Merged" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "model.safetensors" in names
    assert "adapter_config.json" not in names
    stored = json.loads((tmp_path / "merged/config.json").read_text())
    assert "is_adapter" not in stored
    names = load_file(tmp_path / "merged/model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name or "modules_to_save" in name for name in names)
    merged = SetEncoderForReranking.from_pretrained(str(tmp_path / "merged"))
    assert scores(merged) == pytest.approx(expected["bert"], abs=1e-5)
    assert all(weight.requires_grad for weight in merged.parameters())
    with pytest.raises(InputError, match="is no adapter"):
        merge_adapter([str(tmp_path / "merged"), str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_a_method_that_cannot_merge_says_so_and_leaves_nothing(backbones, tmp_path):
    trained(backbones["bert"], "lily").save_pretrained(tmp_path / "lily")
    with pytest.raises(InputError, match="'lily' cannot be merged"):
        merge_adapter([str(tmp_path / "lily"), str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


def test_auto_class_pipeline_and_saving_take_an_adapter(adapters, tmp_path):
    folders, expected, _ = adapters
    for family in ("bert", "modernbert"):
        assert scores(AutoModelForSequenceClassification.from_pretrained(folders[family])) == expected[family]
        ranked = pipeline("text-ranking", model=folders[family])(QUERY, PASSAGES)
        assert [row["score"] for row in sorted(ranked, key=lambda row: row["index"])] == expected[family]
    opened = SetEncoderForReranking.from_pretrained(folders["bert"])
    opened.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    assert scores(SetEncoderForReranking.from_pretrained(str(tmp_path))) == expected["bert"]


def test_a_foreign_or_broken_adapter_is_refused(adapters, tmp_path):
    source = Path(adapters[0]["bert"])
    weights = load_file(source / "adapter_model.safetensors")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    headless = {name: weight for name, weight in weights.items() if ".linear." not in name}
    save_file(headless, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"linear.weight.*are missing"):
        SetEncoderForReranking.from_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    with pytest.raises(ValueError, match="has no score head"):
        SetEncoderForReranking.from_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/not/here"}))
    with pytest.raises(OSError, match="its base model '/not/here' cannot be opened"):
        SetEncoderForReranking.from_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"needs adapter_model.safetensors; pickled weights are not opened"):
        SetEncoderForReranking.from_pretrained(str(tmp_path))


def test_what_is_wrong_with_a_recipe_is_said():
    with pytest.raises(InputError, match="'lorra' is no method.*did you mean 'lora'"):
        ModelArguments("m", peft="lorra")
    with pytest.raises(InputError, match="no setting 'lora_alfa'; did you mean 'lora_alpha'"):
        ModelArguments("m", peft="lora", peft_config='{"lora_alfa": 3}')
    with pytest.raises(InputError, match="needs `peft`"):
        ModelArguments("m", peft_config="{}")
    with pytest.raises(InputError, match="is no JSON"):
        ModelArguments("m", peft="lora", peft_config="r=3")
    assert {"lora", "adalora", "ia3", "loha", "oft", "vera"} <= set(methods())
    assert not {"prompt_tuning", "prefix_tuning", "xlora", "poly"} & set(methods())


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    collection = make_collection(folder / "collection")
    run = make_run(collection)
    words = ["--collection", str(collection), "--labels", "relevance", "--output", str(folder / "train")]
    build_samples(["--run", str(run), *words])
    return folder


def recipe(folder, samples, model, **changed):
    path = folder / "recipe.json"
    fields = {
        "model": model, "train_samples": [str(samples / "train")], "sample_size": 6, "query_length": 8,
        "passage_length": 20, "output_dir": str(folder / "out"), "per_device_train_batch_size": 2, "max_steps": 6,
        "save_strategy": "steps", "save_steps": 3, "eval_strategy": "no", "report_to": "none", "learning_rate": 1e-2,
        "peft": "lora", "peft_config": {"r": 4, "lora_dropout": 0.1}, "disable_tqdm": True, **changed,
    }  # fmt: skip
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return str(path)


def test_training_an_adapter_resumes_to_the_same_weights_and_reranks(backbones, samples, tmp_path, capsys):
    path = recipe(tmp_path, samples, backbones["bert"])
    train([path, "--max_steps", "3", "--lr_scheduler_type", "constant"])
    train([path, "--resume_from_checkpoint", "last", "--lr_scheduler_type", "constant"])
    (tmp_path / "constant").mkdir()
    train([recipe(tmp_path / "constant", samples, backbones["bert"], lr_scheduler_type="constant")])
    resumed = load_file(tmp_path / "out/adapter_model.safetensors")
    straight = load_file(tmp_path / "constant/out/adapter_model.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in resumed)
    assert not list(tmp_path.rglob("training_args.bin"))
    assert not list(tmp_path.rglob("model.safetensors"))
    collection = samples / "collection"
    rerank(
        ["--model", str(tmp_path / "out"), "--run", str(collection / "first.run"), "--collection", str(collection)]
        + ["--output", str(tmp_path / "out.run"), "--dtype", "float32"]
    )
    assert "Re-ranked 6 lists" in capsys.readouterr().out


def test_a_dry_run_counts_the_adapters_weights_and_refuses_what_training_would(backbones, samples, tmp_path, capsys):
    path = recipe(tmp_path, samples, backbones["bert"])
    train([path, "--dry-run"])
    said = capsys.readouterr().out
    train([path, "--max_steps", "1"])
    card = (tmp_path / "out/README.md").read_text()
    [trained] = re.findall(r"([\d,]+) of [\d,]+ weights were trained", card)
    assert f"{trained} trained weights" in said
    with pytest.raises(InputError, match="cannot be put into this model"):
        train(
            [path, "--dry-run", "--output_dir", str(tmp_path / "new"), "--peft_config", '{"target_modules": ["nope"]}']
        )


@pytest.mark.parametrize("changed", [{"passage_length": 4}, {"interaction": "cls"}])
def test_an_adapter_of_a_set_encoder_keeps_its_own_lengths_and_interaction(changed, backbones, tmp_path):
    SetEncoderForReranking.from_pretrained(backbones["bert"], passage_length=20).save_pretrained(tmp_path / "base")
    model = SetEncoderForReranking.from_pretrained(str(tmp_path / "base"), **changed)
    model.open_tokenizer()
    adapter = add_adapter(model, "lora", {"init_lora_weights": False})
    torch.nn.init.normal_(model.linear.weight)
    expected = scores(adapter.get_base_model())
    adapter.save_pretrained(tmp_path / "adapter")
    opened = SetEncoderForReranking.from_pretrained(str(tmp_path / "adapter"))
    assert scores(opened) == expected
    merge(opened).save_pretrained(tmp_path / "merged")
    assert scores(SetEncoderForReranking.from_pretrained(tmp_path / "merged")) == pytest.approx(expected, abs=2e-4)


def test_an_adapter_on_an_adapter_and_whole_training_from_one(backbones, samples, tmp_path):
    train([recipe(tmp_path, samples, backbones["bert"], save_strategy="no")])
    first = str(tmp_path / "out")
    train([recipe(tmp_path, samples, first, save_strategy="no"), "--output_dir", str(tmp_path / "second")])
    second = SetEncoderForReranking.from_pretrained(str(tmp_path / "second"))
    assert json.loads((tmp_path / "second/adapter_config.json").read_text())["base_model_name_or_path"] == first
    assert scores(second) == scores(SetEncoderForReranking.from_pretrained(str(tmp_path / "second")))
    assert scores(second) != scores(SetEncoderForReranking.from_pretrained(first))
    whole = recipe(tmp_path, samples, first, save_strategy="no", peft=None, peft_config=None)
    train([whole, "--output_dir", str(tmp_path / "whole")])
    assert (tmp_path / "whole/model.safetensors").exists()
    assert not (tmp_path / "whole/adapter_config.json").exists()


def test_adalora_shares_out_its_ranks_and_refuses_to_resume(backbones, samples, tmp_path):
    settings = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}
    path = recipe(tmp_path, samples, backbones["bert"], peft="adalora", peft_config=settings)
    train([path])
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    kept = [sum(ranks) for ranks in config["rank_pattern"].values()]
    assert sum(kept) == 2 * len(kept)  # the budget, shared out over all modules
    assert config["total_step"] == 6
    first = SetEncoderForReranking.from_pretrained(str(tmp_path / "out"))
    assert first.adapter.peft_config[ADAPTER].rank_pattern == config["rank_pattern"]
    assert scores(first) == scores(SetEncoderForReranking.from_pretrained(str(tmp_path / "out")))
    with pytest.raises(InputError, match="cannot be had with adalora"):
        train([path, "--resume_from_checkpoint", "last"])

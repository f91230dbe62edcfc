"""The card of a trained model, and what reaches the hub."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers.utils.hub
from huggingface_hub import HfApi, ModelCard

from fake_hub import FakeHub
from setenc_hf.measures import mean, parse_measures, per_query, run_scores
from setenc_hf.modeling import SetEncoderForReranking
from setenc_hf.samples import source_hashes
from setenc_hf.train import main as train
from setenc_hf.trec import read_lists, read_qrels
from small_collection import make_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    make_samples(folder, "train")
    make_samples(folder, "dev", seed=7, has_own_queries=True)
    return folder


def recipe(folder, samples, model, **changed):
    path = folder / "recipe.json"
    fields = {
        "model": model, "train_samples": [str(samples / "train")], "eval_samples": [str(samples / "dev")],
        "eval_depth": 5, "sample_size": 6, "query_length": 8, "passage_length": 20, "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 2, "report_to": "none", "disable_tqdm": True, "license": "apache-2.0",
        "measures": ["nDCG@10", "MRR@10"], **changed,
    }  # fmt: skip
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return str(path)


def train_and_push(path: str) -> tuple[dict[str, float], FakeHub]:
    """Train by a recipe with a hub to push to; return the measures and what the hub got."""
    hub = FakeHub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=hub.url, token="hf_secret"))
        try:
            return train([path, "--push_to_hub", "true", "--hub_model_id", "tester/ranker"]), hub
        finally:
            hub.close()


@pytest.fixture(scope="module")
def pushed(backbones, samples, tmp_path_factory) -> tuple[Path, dict[str, float], FakeHub]:
    folder = tmp_path_factory.mktemp("pushed")
    return folder, *train_and_push(recipe(folder, samples, backbones["bert"]))


def test_a_card_says_what_the_model_is_and_what_it_beats(samples, pushed):
    tmp_path, measures, _ = pushed
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-ranking")
    assert "set-encoder" in card.data.tags
    assert card.data.base_model is None  # a folder of this machine says nothing to others
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: pytest.approx(measures[f"eval_{name}"]) for name in ("nDCG@10", "MRR@10")}
    # the baseline is of the very lists: the run, cut at the depth that was re-ranked
    dev = samples / "dev-collection"
    lists = [(query_id, lines[:5]) for query_id, lines in read_lists(dev / "first.run")]
    values = per_query(parse_measures(["nDCG@10"]), list(read_qrels(dev / "qrels.txt")), run_scores(lists))
    row = f"| dev | nDCG@10 | {mean(values['nDCG@10']):.4f} | {measures['eval_nDCG@10']:.4f} | 4 |"
    text = card.text
    assert row in text
    meta = json.loads((samples / "train/meta.json").read_text())
    [digest] = meta["sources"]["runs"].values()
    assert f"- from `first.run`, SHA-256 `{digest}`" in text
    assert f"- {meta['counts']['lists']} lists" in text
    assert '"sample_size": 6' in text
    assert "arxiv.org/abs/2404.06912" in text
    assert "@inproceedings{" in text
    assert "trust_remote_code=True" in text
    assert str(tmp_path) not in text  # nor any folder of this machine
    assert str(samples) not in text
    for folder in ("out", "out/checkpoint-2", "out/checkpoint-4"):
        assert not (tmp_path / folder / "training_args.bin").exists()
    assert (tmp_path / "out/modeling.py").exists()


def test_a_card_keeps_how_many_tokens_go_at_once(backbones, samples, tmp_path):
    train([recipe(tmp_path, samples, backbones["bert"], max_steps=1, max_tokens_per_chunk=64, eval_strategy="no")])
    assert '"max_tokens_per_chunk": 64' in (tmp_path / "out" / "README.md").read_text()


def test_sources_are_named_so_that_others_find_them():
    digest = "0" * 64
    collections = {"msmarco-passage/train/judged": {"msmarco-passage/train/judged": "ir_datasets 0.6.3"},
                   "/home/me/marco": {"corpus.jsonl": digest}}  # fmt: skip
    assert list(source_hashes({"collection": collections, "runs": {"/home/me/bm25.run": digest}})) == [
        ("msmarco-passage/train/judged", "ir_datasets 0.6.3"),
        ("marco/corpus.jsonl", digest),
        ("bm25.run", digest),
    ]


@pytest.mark.parametrize("peft", [None, "lora"])
def test_push_to_hub_sends_model_tokenizer_and_card_and_no_pickle(peft, pushed, backbones, samples, tmp_path):
    folder, _, hub = pushed
    if peft is not None:
        folder = tmp_path
        changed = {"peft": peft, "eval_samples": None, "eval_strategy": "no"}
        _, hub = train_and_push(recipe(folder, samples, backbones["bert"], **changed))
    assert hub.created[0]["name"] == "ranker"
    *early, (message, files) = hub.commits
    assert message == "End of training"
    weights = "model.safetensors" if peft is None else "adapter_model.safetensors"
    expected = {weights, "config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "recipe.json"}
    assert expected <= files.keys()
    assert ("modeling.py" in files) == (peft is None)
    assert early  # every save is pushed too
    for _, sent in hub.commits:
        assert not [name for name in sent if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        assert not any(b"hf_secret" in content for content in sent.values())
    assert weights in early[0][1]
    # what was sent is a model
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    assert ModelCard.load(tmp_path / "pulled/README.md").data.library_name == ("peft" if peft else "transformers")
    pulled = SetEncoderForReranking.from_pretrained(str(tmp_path / "pulled"))
    local = SetEncoderForReranking.from_pretrained(str(folder / "out"))
    passages = ["the cat of water", "a dog"]
    assert pulled.rank("cat", passages) == local.rank("cat", passages)

"""A saved model opens where this package is not installed, and by this package's own classes where it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from setenc_hf.configuration import SetEncoderConfig
from setenc_hf.modeling import SetEncoderForReranking

ROOT = Path(__file__).parents[1]
QUERY, PASSAGES = "cat life", ["the cat of water", "a dog", "green paper lamp in stone"]
TRAVELLERS = {
    f"{name}.py"
    for name in ("attention", "chunking", "configuration", "cpu_linear", "modeling", "packing", "tokenization")
} | {"varlen_attention.py"}
OPEN = """
import sys

class Absent:  # the package is installed where the tests run: here it must not be found
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("setenc_hf", "data_prep"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from transformers import AutoConfig, AutoModelForSequenceClassification

folder = sys.argv[1]
for unasked in (AutoConfig, AutoModelForSequenceClassification):
    try:
        unasked.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("foreign code ran unasked")
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
print("\\nmodule", type(model).__module__)
ranked = model.rank("cat life", ["the cat of water", "a dog", "green paper lamp in stone"])
print("scores", *(row["score"].hex() for row in sorted(ranked, key=lambda row: row["index"])))
assert not any(name.startswith("setenc_hf") for name in sys.modules)
model.save_pretrained(sys.argv[2])

sys.meta_path.pop(0)
import setenc_hf.modeling  # its own copy of the same code

model.max_tokens_per_chunk = 1
again = model.rank("cat life", ["the cat of water", "a dog", "green paper lamp in stone"])
assert [row["index"] for row in again] == [row["index"] for row in ranked]
assert all(abs(row["score"] - before["score"]) < 1e-6 for row, before in zip(again, ranked))
"""


@pytest.fixture(scope="module")
def saved(backbones, tmp_path_factory) -> tuple[str, list[float]]:
    torch.manual_seed(0)
    model = SetEncoderForReranking.from_pretrained(backbones["bert"], query_length=8, passage_length=20)
    folder = str(tmp_path_factory.mktemp("model"))
    model.save_pretrained(folder)
    return folder, [row["score"] for row in sorted(model.rank(QUERY, PASSAGES), key=lambda row: row["index"])]


def opened(*words: str, home: Path) -> dict[str, list[str]]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *words],
        capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if " " in line}


def test_a_saved_model_opens_without_the_package(saved, tmp_path):
    folder, expected = saved
    assert {path.name for path in Path(folder).glob("*.py")} == TRAVELLERS
    names = json.loads((Path(folder) / "config.json").read_text())["auto_map"]
    assert names == {
        "AutoConfig": "configuration.SetEncoderConfig",
        "AutoModelForSequenceClassification": "modeling.SetEncoderForReranking",
    }
    printed = opened(folder, str(tmp_path / "again"), home=tmp_path / "home")
    assert printed["module"][0].startswith("transformers_modules.")
    assert [float.fromhex(word) for word in printed["scores"]] == expected
    # what was saved there opens here, by our own classes, and carries the code on
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == TRAVELLERS
    again = SetEncoderForReranking.from_pretrained(str(tmp_path / "again"))
    assert [row["score"] for row in sorted(again.rank(QUERY, PASSAGES), key=lambda row: row["index"])] == expected


def test_with_the_package_its_own_classes_win_and_nobody_is_asked(saved, monkeypatch):
    folder, expected = saved
    monkeypatch.setattr("builtins.input", None)  # a question would fail
    for asked in ({}, {"trust_remote_code": True}):
        model = AutoModelForSequenceClassification.from_pretrained(folder, **asked)
        assert type(model) is SetEncoderForReranking
        assert type(model.config) is SetEncoderConfig
        assert [row["score"] for row in sorted(model.rank(QUERY, PASSAGES), key=lambda row: row["index"])] == expected
    assert not any(name.startswith("transformers_modules.") for name in sys.modules)

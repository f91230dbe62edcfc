"""The mean of models: exact, whatever their order, and refused where it would be none."""

import pytest
import torch
from safetensors.torch import load_file

from setenc_hf.adapters import add_adapter
from setenc_hf.average_models import main as average_models
from setenc_hf.errors import InputError
from setenc_hf.modeling import SetEncoderForReranking


def trained(backbone, folder, seed, **fields):
    """Save a Set-Encoder whose weights have all been moved, as by training."""
    torch.manual_seed(seed)
    model = SetEncoderForReranking.from_pretrained(backbone, query_length=8, passage_length=20, **fields)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return str(folder)


def weights_of(folder):
    return load_file(f"{folder}/model.safetensors")


def test_the_mean_of_two_is_exact_and_a_start_counts_with_all_but_the_head(backbones, family, tmp_path, capsys):
    first, second = (trained(backbones[family], tmp_path / str(seed), seed) for seed in (1, 2))
    average_models(["--models", first, second, "--output", str(tmp_path / "mean")])
    a, b, mean = weights_of(first), weights_of(second), weights_of(tmp_path / "mean")
    assert mean.keys() == a.keys()
    for name in mean:
        assert torch.equal(mean[name], ((a[name].double() + b[name].double()) / 2).float())
    # what was trained, two fifths each, and a fifth of where it started
    average_models(
        ["--models", first, second, backbones[family], "--weights", ".4", ".4", ".2", "--output", str(tmp_path / "c")]
    )
    start = SetEncoderForReranking.from_pretrained(backbones[family])
    used = len(start.tokenizer)  # rows behind are no token's
    begun, mixed = start.state_dict(), weights_of(tmp_path / "c")
    for name in mixed:
        expected = 0.4 * a[name].double() + 0.4 * b[name].double() + 0.2 * begun[name].double()
        if name.startswith("linear."):
            expected = (a[name].double() + b[name].double()) / 2
        torch.testing.assert_close(mixed[name][:used], expected.float()[:used], rtol=2e-7, atol=1e-9)
    assert "0.2000  " in capsys.readouterr().out
    opened = SetEncoderForReranking.from_pretrained(str(tmp_path / "c"))
    assert len(opened.rank("cat life", ["the cat of water", "a dog"])) == 2
    assert "| 0.2 | " in (tmp_path / "c" / "README.md").read_text("utf-8")


def test_what_has_no_mean_is_refused_in_one_line_and_nothing_is_written(backbones, tmp_path):
    plain, other = backbones["bert"], backbones["electra"]
    model = trained(plain, tmp_path / "a", 1)
    none = trained(plain, tmp_path / "none", 2, interaction="none")
    foreign = trained(other, tmp_path / "electra", 3)
    adapted = add_adapter(SetEncoderForReranking.from_pretrained(plain), "lora", None)
    adapted.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "out"
    for models, message in [
        ([model], "a mean takes two"),
        ([plain, model], "is no Set-Encoder yet"),
        ([model, none], "`interaction` is 'int'"),
        ([model, foreign], "not of one backbone"),
        ([model, str(tmp_path / "adapter")], "is an adapter"),
        ([model, str(tmp_path / "nothing")], "no such folder"),
    ]:
        with pytest.raises(InputError, match=message):
            average_models(["--models", *models, "--output", str(output)])
    for weights, message in [
        (["1"], "1 numbers for 2 models"),
        (["0", "1"], "no model with a weight above 0"),
        (["-1", "2"], "at least 0"),
        (["nan", "1"], "at least 0"),
    ]:
        with pytest.raises(InputError, match=message):
            average_models(["--models", model, plain, "--weights", *weights, "--output", str(output)])
    assert not output.exists()
    average_models(["--models", model, model, "--output", str(output)])
    with pytest.raises(InputError, match="not empty"):
        average_models(["--models", model, plain, "--output", str(output)])
    average_models(["--models", model, plain, "--weights", "1", "0", "--output", str(output), "--overwrite"])
    kept = weights_of(model)
    assert all(torch.equal(weight, kept[name]) for name, weight in weights_of(output).items())

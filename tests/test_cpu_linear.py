"""oneDNN's linear layers: the same numbers, the activation never lost nor computed twice, adapters left alone."""

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation

from setenc_hf import chunking
from setenc_hf.chunking import linear_layers
from setenc_hf.cpu_linear import OneDnnLinear, has_bfloat16, widening
from setenc_hf.modeling import SetEncoderForReranking

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="torch has no oneDNN here",
)


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(48, 96)
        self.intermediate_act_fn: nn.Module = GELUActivation()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(self.dense(states))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.intermediate = Intermediate()


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What oneDNN is asked to compute behind a linear layer."""
    kept, real = [], torch.ops.mkldnn._linear_pointwise

    class Recorded:
        def __call__(self, *args):
            kept.append(args[3])
            return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Recorded(), raising=False)
    return kept


@torch.no_grad()
@pytest.mark.parametrize("rows", [64, 200])
def test_gelu_is_computed_once_and_with_its_layer(layer, calls, rows):
    states = torch.randn(1, rows, 48)
    expected = layer.intermediate(states)
    with OneDnnLinear(widening(layer)):
        found = layer.intermediate(states)
        again = nn.functional.gelu(layer.intermediate.dense(states))  # the context may be used twice
    assert calls == ["gelu", "gelu"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(found, again)
    with OneDnnLinear():
        found = layer.intermediate(states)
    assert calls[2:] == ["none"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_bfloat16_as_close_as_torchs_own(layer, calls):
    if not has_bfloat16():
        pytest.skip("oneDNN does not compute in bfloat16 on this processor")
    states = torch.randn(1, 100, 48)
    exact = layer.intermediate(states)
    layer.bfloat16()
    with OneDnnLinear(widening(layer)):
        found = layer.intermediate(states.bfloat16())
    assert calls == ["gelu"]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)


@torch.no_grad()
def test_few_rows_mixed_types_and_autocast_are_left_to_torch(layer, calls):
    dense = layer.intermediate.dense
    few = torch.ones(1, 63, 48)
    expected = layer.intermediate(few)
    with OneDnnLinear(widening(layer)):
        assert torch.equal(layer.intermediate(few), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert dense(torch.ones(1, 100, 48)).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            dense(torch.ones(1, 100, 48).double())
    assert calls == []


@torch.no_grad()
def test_an_activation_that_never_came_is_an_error(layer):
    with pytest.raises(RuntimeError, match="did not go through GELU"), OneDnnLinear(widening(layer)):
        layer.intermediate.dense(torch.ones(1, 100, 48))


def test_what_is_not_as_built_is_not_widened_with_its_activation(layer):
    assert widening(layer) is layer.intermediate.dense
    assert widening(nn.Module()) is None
    layer.intermediate.intermediate_act_fn = GELUActivation(use_gelu_python=True)
    assert widening(layer) is None
    layer.intermediate.intermediate_act_fn = nn.ReLU()
    assert widening(layer) is None
    layer = Layer()
    layer.intermediate.dense.register_forward_hook(lambda *_: None)
    assert widening(layer) is None
    layer = Layer()
    layer.intermediate.dense = type("LoraLinear", (nn.Linear,), {})(48, 96)
    assert widening(layer) is None


def test_only_where_nothing_is_differentiated(layer, monkeypatch):
    monkeypatch.setattr(chunking, "is_faster", lambda: True)
    states = torch.ones(1, 100, 48)
    assert not isinstance(linear_layers(layer, states), OneDnnLinear)
    with torch.no_grad():
        context = linear_layers(layer, states)
        assert isinstance(context, OneDnnLinear)
        assert context.widened is layer.intermediate.dense.weight
        monkeypatch.setattr(chunking, "is_faster", lambda: False)
        assert not isinstance(linear_layers(layer, states), OneDnnLinear)


@torch.no_grad()
def test_every_family_scores_the_same_with_it(backbones, family, calls, monkeypatch):
    torch.manual_seed(1)
    model = SetEncoderForReranking.from_pretrained(backbones[family], query_length=8, passage_length=20)
    passages = ["the cat of water", "a dog", "green paper lamp in stone", "life cycle of the flea in days"] * 6
    monkeypatch.setattr(chunking, "is_faster", lambda: False)
    expected = [row["score"] for row in sorted(model.rank("cat life", passages), key=lambda row: row["index"])]
    monkeypatch.setattr(chunking, "is_faster", lambda: True)
    found = [row["score"] for row in sorted(model.rank("cat life", passages), key=lambda row: row["index"])]
    assert ("gelu" in calls) == (family not in ("distilbert", "modernbert"))
    assert calls.count("none") > 0
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)

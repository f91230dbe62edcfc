"""Gradient checkpointing changes what is remembered, never what is learned."""

import pytest
import torch

from setenc_hf.lists import ListwiseCollator
from setenc_hf.losses import RankNetLoss
from setenc_hf.modeling import SetEncoderForReranking

LISTS = [
    {"query": "cat life", "passages": ["blue river", "a cat", "stone paper lamp " * 3, "dog"], "labels": [0, 2, 1, 0]},
    {"query": "green water", "passages": ["water is green", "the lamp"], "labels": [1, 0]},
]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_equal_those_without(backbones, family, reentrant):
    model = SetEncoderForReranking.from_pretrained(backbones[family], query_length=8, passage_length=20).train()
    batch = ListwiseCollator(model.tokenizer)(LISTS)
    labels = batch.pop("labels")

    calls = []
    attention = next(module for name, module in model.named_modules() if name.endswith(("attention", "attn")))
    attention.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        calls.clear()
        torch.manual_seed(0)  # dropout is on, and the second computation must draw it again
        loss = RankNetLoss()(model(**batch).logits, labels)
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        return loss.item(), gradients, len(calls)

    loss, expected, once = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # a reentrant checkpoint passes gradients only where its input needs one
    again, got, twice = gradients()
    assert again == loss
    assert (once, twice) == (1, 2)  # it was computed anew in the backward pass
    assert got.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)

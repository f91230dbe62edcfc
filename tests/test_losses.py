"""Losses: exact numbers, and what holds for every one of them."""

import math

import pytest
import torch

from setenc_hf.losses import LOSSES
from setenc_hf.samples import IGNORE_LABEL

X = IGNORE_LABEL


@pytest.fixture(params=list(LOSSES))
def loss(request):
    return LOSSES[request.param]()


def value(name, scores, labels, **kwargs):
    return LOSSES[name](**kwargs)(torch.tensor([scores]), torch.tensor([labels])).item()


def test_exact_numbers():
    scores = [2.0, 0.0, 1.0]
    e = math.exp
    assert value("infonce", scores, [1.0, 0.0, 0.0]) == pytest.approx(-math.log(e(2) / (e(2) + e(0) + e(1))))
    both = [-math.log(e(s) / (e(s) + e(0))) for s in (2, 1)]
    assert value("infonce", scores, [1.0, 0.0, 3.0]) == pytest.approx(sum(both) / 2)
    pairs = [math.log1p(e(0 - 2)), math.log1p(e(1 - 2)), math.log1p(e(1 - 0))]
    assert value("ranknet", scores, [3.0, 2.0, 1.0]) == pytest.approx(sum(pairs) / 3)
    log_q = [s - math.log(e(2) + e(0) + e(1)) for s in scores]
    p = [e(y) / (e(1) + e(0) + e(0)) for y in (1, 0, 0)]
    assert value("listnet", scores, [1.0, 0.0, 0.0]) == pytest.approx(-sum(a * b for a, b in zip(p, log_q)))
    kl = sum(a * (math.log(a) - b) for a, b in zip(p, log_q))
    assert value("kl_divergence", scores, [1.0, 0.0, 0.0]) == pytest.approx(kl, rel=1e-5)
    assert value("margin_mse", scores, [3.0, 0.0, 1.0]) == pytest.approx(((2 - 3) ** 2 + (1 - 2) ** 2 + 0) / 3)
    assert value("infonce", [4.0, 0.0], [1.0, 0.0], temperature=2.0) == pytest.approx(math.log1p(e(-2)))


def test_a_list_that_teaches_nothing_costs_nothing():
    for name in ("infonce", "ranknet", "listnet"):
        for labels in ([1.0, 1.0], [0.0, 0.0], [1.0, X], [X, X]):
            assert value(name, [3.0, -2.0], labels) == 0


@pytest.mark.parametrize(
    "labels",
    [[[1.0, 1.0, 0.0]], [[2.0, 2.0, 2.0]], [[0.0, 0.0, 0.0]], [[1.0, X, X]], [[X, X, X]], [[5.0, 0.0, X], [0.0, X, X]]],
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_losses_and_gradients_are_finite(loss, labels, scale):
    labels = torch.tensor(labels)
    scores = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0)) * scale
    scores = scores.masked_fill(labels == X, -torch.inf).requires_grad_()
    result = loss(scores, labels)
    result.backward()
    assert result.isfinite()
    assert scores.grad.isfinite().all()
    assert (scores.grad[labels == X] == 0).all()


def test_a_padded_batch_equals_its_single_lists(loss):
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([[2.0, 0.0, 1.0, 0.0], [1.0, 0.0, X, X], [0.0, 3.0, 1.0, X]])
    scores = torch.randn(labels.shape, generator=draw)
    single = [loss(s[y != X][None], y[y != X][None]) for s, y in zip(scores, labels)]
    torch.testing.assert_close(loss(scores, labels), torch.stack(single).mean())


def test_the_order_of_a_list_does_not_matter(loss):
    labels = torch.tensor([[2.0, 0.0, 1.0, 0.0, 1.0]])
    scores = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(loss(scores[:, order], labels[:, order]), loss(scores, labels))


def test_a_better_order_costs_less(loss):
    labels = torch.tensor([[2.0, 1.0, 0.0]])
    values = [loss(torch.tensor([scores]), labels) for scores in ([2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 2.0])]
    assert values[0] <= values[1] < values[2]


def test_losses_are_computed_in_float32(loss):
    labels = torch.tensor([[1.0, 0.0, 0.0]])
    scores = torch.tensor([[0.7, 0.1, -0.4]], dtype=torch.bfloat16)
    assert loss(scores, labels).dtype == torch.float32
    torch.testing.assert_close(loss(scores, labels), loss(scores.float(), labels))


def test_scores_and_labels_must_align(loss):
    with pytest.raises(ValueError, match="must align"):
        loss(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="temperature"):
        type(loss)(temperature=0)

"""Our losses against those of the same names in sentence-transformers, list by list.

What differs by convention and is taken into account here: theirs of pairs are means over the pairs of the whole batch
(ours over a list, then over lists), RankNet has a binary logarithm, ADR-MSE is a mean over the passages of the whole
batch, and ListMLE teaches some order of equal labels, so that its lists here have none.
"""

import math

import pytest
import torch

from setenc_hf.losses import LOSSES

pytestmark = pytest.mark.slow  # importing sentence-transformers takes ten seconds


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("sentence_transformers.cross_encoder.losses")


class GivenScores:
    """A model that gives the scores it was made with, one a pair."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores):
        self.scores = iter(scores)

    def preprocess(self, pairs, prompt=None, task=None):
        return {"scores": torch.stack([next(self.scores) for _ in pairs])}

    def __call__(self, tokens):
        return tokens


def lists(ties, sizes):
    draw = torch.Generator().manual_seed(0)
    for size in sizes:
        labels = torch.randint(4, (size,), generator=draw).float() if ties else torch.arange(size).float()
        if ties and size > 1:
            labels[:2] = torch.tensor([0.0, 1.0])
        yield torch.randn(size, generator=draw) * 2, labels[torch.randperm(size, generator=draw)]


def compare(loss, their_loss, ties=True, factor=1.0, sizes=(5, 1, 2, 9, 30), **options):
    for scores, labels in lists(ties, sizes):
        mine, other = (scores.clone().requires_grad_() for _ in range(2))
        value = loss(mine[None], labels[None])
        passages = [f"passage {n}" for n in range(len(scores))]
        expected = their_loss(GivenScores(other), **options)([["query"], [passages]], [labels]) * factor
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        value.backward()
        if expected.grad_fn is not None and len(scores) > 1:
            expected.backward()
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize(
    ("weighting", "scheme"),
    [
        ("none", "NoWeightingScheme"),
        ("ndcg2", "NDCGLoss2Scheme"),
        ("lambdarank", "LambdaRankScheme"),
        ("ndcg2pp", "NDCGLoss2PPScheme"),
    ],
)
def test_lambdaloss(theirs, weighting, scheme, k):
    scheme = getattr(theirs, scheme)()
    compare(LOSSES["lambdaloss"](weighting=weighting, k=k), theirs.LambdaLoss, weighting_scheme=scheme, k=k)
    warm = LOSSES["lambdaloss"](weighting=weighting, k=k, temperature=2.0)
    compare(warm, theirs.LambdaLoss, weighting_scheme=scheme, k=k, sigma=0.5)


def test_lambdaloss_of_ndcg1_but_for_a_list_of_one(theirs):
    loss, scheme = LOSSES["lambdaloss"](weighting="ndcg1"), theirs.NDCGLoss1Scheme()
    compare(loss, theirs.LambdaLoss, weighting_scheme=scheme, sizes=(5, 2, 9, 30))


def test_ranknet(theirs):
    compare(LOSSES["ranknet"](), theirs.RankNetLoss, factor=math.log(2))


def test_listnet(theirs):
    compare(LOSSES["listnet"](), theirs.ListNetLoss)


def test_listmle(theirs):
    compare(LOSSES["listmle"](), theirs.ListMLELoss, ties=False, respect_input_order=False)


def test_p_listmle(theirs):
    compare(LOSSES["p_listmle"](), theirs.PListMLELoss, ties=False, respect_input_order=False)


def test_adr_mse(theirs):
    compare(LOSSES["adr_mse"](), theirs.ADRMSELoss)
    compare(LOSSES["adr_mse"](temperature=0.5), theirs.ADRMSELoss, alpha=2.0)

"""Losses: exact numbers, and what holds for every one of them."""

import math

import pytest
import torch

from setenc_hf.errors import InputError
from setenc_hf.losses import LOSSES, MixtureLoss, parse_loss
from setenc_hf.samples import IGNORE_LABEL

X = IGNORE_LABEL
ALL = [
    *LOSSES,
    *[f"lambdaloss(weighting={name})" for name in ("none", "ndcg1", "ndcg2", "lambdarank")],
    "lambdaloss(k=2)",
    "approx_ndcg(gain=linear, temperature=0.1)",
    "neural_ndcg(k=2)",
    "adr_mse(discount=none)",
    "ranknet + 0.5 * infonce(temperature=0.05) + p_listmle",
]


@pytest.fixture(params=ALL)
def loss(request):
    return parse_loss(request.param)


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


def test_exact_numbers_of_lists():
    scores = [2.0, 0.0, 1.0]
    e, log2 = math.exp, math.log2
    likelihood = e(0) / (e(0) + e(2) + e(1)) * e(2) / (e(2) + e(1))
    assert value("listmle", scores, [2.0, 3.0, 1.0]) == pytest.approx(-math.log(likelihood))
    # two of the best label do not compete with each other
    tied = e(2) / (e(2) + e(1)) * e(0) / (e(0) + e(1))
    assert value("listmle", scores, [3.0, 3.0, 1.0]) == pytest.approx(-math.log(tied))
    first, second = -math.log(e(0) / (e(0) + e(2) + e(1))), -math.log(e(2) / (e(2) + e(1)))
    assert value("p_listmle", scores, [2.0, 3.0, 1.0]) == pytest.approx((3 * first + 1 * second) / 4)
    halves = [-math.log(e(s) / (e(s) + e(1))) for s in (2, 0)]
    assert value("p_listmle", scores, [3.0, 3.0, 1.0]) == pytest.approx(sum(halves) * 2 / 4)
    correlation = torch.corrcoef(torch.tensor([scores, [0.5, 1.0, -3.0]]))[0, 1].item()
    assert value("pearson", scores, [0.5, 1.0, -3.0]) == pytest.approx(1 - correlation)

    def above(a, b):
        return 1 / (1 + e(a - b))  # how much a score of b stands above one of a

    ranks = [1 + sum(above(s, t) for u, t in enumerate(scores) if u != n) for n, s in enumerate(scores)]
    ideal = 3 / log2(2) + 1 / log2(3)
    ndcg = (1 / log2(1 + ranks[0]) + 3 / log2(1 + ranks[1])) / ideal
    assert value("approx_ndcg", scores, [1.0, 2.0, 0.0]) == pytest.approx(1 - ndcg)
    linear = (1 / log2(1 + ranks[0]) + 2 / log2(1 + ranks[1])) / (2 + 1 / log2(3))
    assert value("approx_ndcg", scores, [1.0, 2.0, -1.0], gain="linear") == pytest.approx(1 - linear)
    assert value("approx_mrr", scores, [0.0, 1.0, 2.0]) == pytest.approx(1 - 1 / ranks[2])
    errors = [(true - rank) ** 2 for true, rank in zip([2, 1, 3], ranks)]
    expected = sum(error / log2(1 + true) for error, true in zip(errors, [2, 1, 3])) / 3
    assert value("adr_mse", scores, [5.0, 9.0, 1.0]) == pytest.approx(expected)
    assert value("adr_mse", scores, [5.0, 9.0, 1.0], discount="none") == pytest.approx(sum(errors) / 3)
    tied_ranks = [1.5, 1.5, 3]
    expected = sum((true - rank) ** 2 / true for true, rank in zip(tied_ranks, ranks)) / 3
    assert value("adr_mse", scores, [9.0, 9.0, 1.0], discount="reciprocal") == pytest.approx(expected)


def test_exact_numbers_of_lambdaloss():
    scores, labels = [2.0, 0.0, 1.0], [0.0, 2.0, 1.0]  # the model's order: 0, 2, 1
    log2, e = math.log2, math.exp
    ideal = 3 / log2(2) + 1 / log2(3)
    gains, ranks = [0.0, 3 / ideal, 1 / ideal], [1, 3, 2]
    d = {rank: 1 / log2(1 + rank) for rank in (1, 2, 3)}
    pairs = [(1, 0), (1, 2), (2, 0)]

    def mean(weight, pairs=pairs):
        logistic = [weight(i, j) * log2(1 + e(scores[j] - scores[i])) for i, j in pairs]
        return pytest.approx(sum(logistic) / len(pairs), rel=1e-5)

    def delta(i, j):
        apart = abs(ranks[i] - ranks[j])
        return (d[apart] - d[apart + 1]) * abs(gains[i] - gains[j])

    def rank_delta(i, j):
        return abs(d[ranks[i]] - d[ranks[j]]) * abs(gains[i] - gains[j])

    def loss(**options):
        return value("lambdaloss", scores, labels, **options)

    assert loss(weighting="none") == mean(lambda i, j: 1.0)
    every = [(i, j) for i in range(3) for j in range(3)]
    assert loss(weighting="ndcg1") == mean(lambda i, j: gains[i] * d[ranks[i]], every)
    d[4] = 1 / log2(5)
    assert loss(weighting="ndcg2") == mean(delta)
    assert loss(weighting="lambdarank") == mean(rank_delta)
    assert loss() == mean(lambda i, j: 10 * delta(i, j) + rank_delta(i, j))
    assert loss(mu=2.0) == mean(lambda i, j: 2 * delta(i, j) + rank_delta(i, j))
    assert loss(weighting="none", k=1) == mean(lambda i, j: 1.0, [(1, 0), (2, 0)])


def test_neural_ndcg_becomes_ndcg_as_the_temperature_falls():
    scores, labels = [2.0, 0.0, 1.0, -1.0], [0.0, 2.0, 1.0, 1.0]
    discount = [1 / math.log2(1 + rank) for rank in (1, 2, 3, 4)]
    gains = [0, 1, 3, 1]  # in the model's order
    for k, ideal in ((4, [3, 1, 1, 0]), (2, [3, 1])):
        dcg = sum(gain * d for gain, d in zip(gains[:k], discount))
        ndcg = dcg / sum(gain * d for gain, d in zip(ideal, discount))
        assert value("neural_ndcg", scores, labels, temperature=0.01, k=k) == pytest.approx(1 - ndcg, abs=1e-5)


def test_a_list_that_teaches_nothing_costs_nothing(request, loss):
    labels = [[1.0, 1.0], [0.0, 0.0], [1.0, X], [X, X]]
    results = loss(torch.tensor([[3.0, -2.0]] * 4), torch.tensor(labels))
    name = request.node.callspec.params["loss"]
    if name not in ("kl_divergence", "margin_mse"):  # to these two, equal scores of a teacher say something
        assert results == 0


def test_large_labels_do_not_overflow():
    labels = torch.arange(200, 0, -1.0)[None]
    for name in ALL:
        result = parse_loss(name)(labels / 100, labels)
        assert result.isfinite(), name


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
    labels = torch.tensor([[2.0, 0.0, 1.0, 0.0], [-1.0, -2.0, X, X], [0.0, 3.0, 1.0, X]])
    scores = torch.randn(labels.shape, generator=draw)
    single = [loss(s[y != X][None], y[y != X][None]) for s, y in zip(scores, labels)]
    torch.testing.assert_close(loss(scores, labels), torch.stack(single).mean())


def test_the_order_of_a_list_does_not_matter(loss):
    labels = torch.tensor([[2.0, 0.0, 1.0, 0.0, 1.0]])
    scores = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(loss(scores[:, order], labels[:, order]), loss(scores, labels))
    scores = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0]])  # equal scores have no order either
    torch.testing.assert_close(loss(scores[:, order], labels[:, order]), loss(scores, labels))


def test_a_better_order_costs_less(loss):
    labels = torch.tensor([[2.0, 1.0, 0.0]])
    values = [loss(torch.tensor([scores]), labels) for scores in ([2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 2.0])]
    assert values[0] <= values[1] < values[2]


def test_following_the_gradient_brings_the_relevant_passage_to_the_top(loss):
    labels = torch.tensor([[2.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, X]])
    scores = torch.zeros(labels.shape)
    scores[:, 1] = 0.1
    for _ in range(20):
        scores = scores.detach().requires_grad_()
        loss(scores, labels).backward()
        scores = scores - 0.05 * scores.grad / scores.grad.norm().clamp(min=1e-6)
    assert scores.argmax(-1).tolist() == [0, 0]


def test_losses_are_computed_in_float32(loss):
    labels = torch.tensor([[1.0, 0.0, 0.0]])
    scores = torch.tensor([[0.7, 0.1, -0.4]], dtype=torch.bfloat16)
    assert loss(scores, labels).dtype == torch.float32
    torch.testing.assert_close(loss(scores, labels), loss(scores.float(), labels))


def test_scores_and_labels_must_align(loss):
    with pytest.raises(ValueError, match="must align"):
        loss(torch.zeros(1, 3), torch.zeros(1, 2))


def test_a_mixture_adds_up_its_losses():
    scores, labels = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    mixture = parse_loss("lambdaloss(weighting=lambdarank, k=2)+ 0.5*infonce(temperature=0.05) + 1e-1 * adr_mse", 2.0)
    parts = [
        LOSSES["lambdaloss"](weighting="lambdarank", k=2, temperature=2.0)(scores, labels),
        0.5 * LOSSES["infonce"](temperature=0.05)(scores, labels),
        0.1 * LOSSES["adr_mse"](temperature=2.0)(scores, labels),
    ]
    torch.testing.assert_close(mixture(scores, labels), sum(parts))
    assert mixture.needs == ("relevance",)
    assert parse_loss("adr_mse + pearson").needs == ("relevance", "rank", "score")
    assert parse_loss("margin_mse + lambdaloss(gain=linear)").needs == ("relevance",)
    assert isinstance(parse_loss("2 * ranknet"), MixtureLoss)
    assert not isinstance(parse_loss(" ranknet "), MixtureLoss)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranknett", "no such loss; did you mean 'ranknet'?"),
        ("ranknet + lamdaloss(k=3)", "loss 'lamdaloss': no such loss; did you mean 'lambdaloss'?"),
        ("lambdaloss(weigthing=ndcg1)", "loss 'lambdaloss': no option 'weigthing'; did you mean 'weighting'?"),
        ("pearson(temperature=2)", "loss 'pearson': no option 'temperature' (it has none)"),
        ("lambdaloss(weighting=ndcg3)", "`weighting` is one of none, ndcg1, ndcg2, lambdarank, ndcg2pp, got 'ndcg3'"),
        ("lambdaloss(k=ten)", "loss 'lambdaloss': `k` is a whole number, got 'ten'"),
        ("lambdaloss(k=0)", "`k` must be at least 1 passage, got 0"),
        ("infonce(temperature=0)", "loss 'infonce': `temperature` must be above 0, got 0.0"),
        ("infonce(temperature=cold)", "`temperature` is a number, got 'cold'"),
        ("infonce(0.5)", "an option is written name=value, got '0.5'"),
        ("neural_ndcg(gain=log)", "`gain` is one of exponential, linear, got 'log'"),
        ("adr_mse(discount=log)", "`discount` is one of log2, reciprocal, none, got 'log'"),
        ("0 * ranknet", "the weight of 'ranknet' must be above 0, got 0"),
        ("ranknet +", "expected the name of a loss at its end"),
        ("ranknet - infonce", "expected '+' or the end at '- infonce'"),
        ("-1 * infonce", "expected the name of a loss at '-1 * infonce'"),
        ("", "expected the name of a loss at its end"),
    ],
)
def test_a_loss_that_is_none_is_one_clear_line(text, message):
    with pytest.raises(InputError) as error:
        parse_loss(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

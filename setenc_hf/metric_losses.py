"""Losses that are measures made differentiable: ApproxNDCG, ApproxMRR, ADR-MSE and NeuralNDCG."""

import torch
from torch import Tensor

from .loss_base import GainLoss, ListwiseLoss, approximate_ranks, discounts, has_order, mean_ranks

SINKHORN_ROUNDS = 50  # the most that the authors' implementation makes
RANK_DISCOUNTS = ("log2", "reciprocal", "none")


class ApproxNDCGLoss(GainLoss):
    r"""One minus nDCG at differentiable ranks: $1 - \sum_i \frac{G_i}{\log_2(1 + \hat r_i)}$.

    $\hat r_i = 1 + \sum_{j \ne i} \sigma(s_j - s_i)$, and $G_i$ is the gain over the ideal DCG (Qin et al. 2010, "A
    general approximation framework for direct optimization of information retrieval measures"; Bruch et al. 2019).
    A low temperature comes closer to nDCG and has smaller gradients; TF-Ranking's default is 0.1, lightning-ir's 1.
    A list of equal labels costs 0.
    """

    def __init__(self, temperature: float = 1.0, gain: str = "exponential") -> None:
        super().__init__(temperature, None, gain)

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        ndcg = (self.gains(labels) * discounts(approximate_ranks(scores, kept))).sum(-1)
        return (1 - ndcg) * has_order(labels, kept)


class ApproxMRRLoss(ListwiseLoss):
    r"""One minus the reciprocal differentiable rank of the best relevant passage: $1 - \max_{i: y_i > 0} 1 / \hat r_i$.

    $\hat r_i = 1 + \sum_{j \ne i} \sigma(s_j - s_i)$ as in `ApproxNDCGLoss`. The measure's one passage as in
    lightning-ir; TF-Ranking takes the mean over the relevant ones. A list without a relevant or a non-relevant
    passage costs 0.
    """

    needs = ("relevance",)

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        relevant = labels.gt(0) & kept
        reciprocal = (relevant / approximate_ranks(scores, kept)).amax(-1)
        return (1 - reciprocal) * (relevant.any(-1) & (labels.le(0) & kept).any(-1))


class ADRMSELoss(ListwiseLoss):
    r"""Approximate, discounted error of ranks: $\frac{1}{n}\sum_i \frac{(r_i - \hat r_i)^2}{\log_2(1 + r_i)}$.

    $r_i$ is the rank by the labels (equal labels share the mean of theirs) and $\hat r_i = 1 + \sum_{j \ne i}
    \sigma(s_j - s_i)$ the model's (Schlatt et al. 2025, "Rank-DistiLLM", arXiv 2405.07920). A list of equal labels
    costs 0.

    Args:
        discount: `log2` as above; `reciprocal`, $1 / r_i$; or `none`, which is lightning-ir's default.
    """

    def __init__(self, temperature: float = 1.0, discount: str = "log2") -> None:
        super().__init__(temperature)
        if discount not in RANK_DISCOUNTS:
            raise ValueError(f"`discount` is one of {', '.join(RANK_DISCOUNTS)}, got {discount!r}")
        self.discount = discount

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        ranks = mean_ranks(labels, kept)
        errors = (ranks - approximate_ranks(scores, kept)).square() * kept
        if self.discount != "none":
            errors = errors * (discounts(ranks) if self.discount == "log2" else 1 / ranks)
        return errors.sum(-1) / kept.sum(-1).clamp(min=1) * has_order(labels, kept)


class NeuralNDCGLoss(GainLoss):
    r"""One minus nDCG@k of softly sorted gains: $1 - \sum_{r \le k} \frac{(\hat P G)_r}{\log_2(1 + r)}$.

    Pobrotyn and Białobrzeski 2021 (arXiv 2102.07831), the deterministic form. Row $r$ of $\hat P$ is
    $\mathrm{softmax}_i((n + 1 - 2r) s_i - \sum_j |s_i - s_j|)$, NeuralSort (Grover et al. 2019, arXiv 1903.08850),
    made doubly stochastic by Sinkhorn's scaling, here in logarithms and always 50 rounds, so that a list's value does
    not depend on its batch. $G$ are gains over the ideal DCG@k. A list of equal labels costs 0.
    """

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        permutation = soft_permutation(scores, kept)
        gains = (permutation * self.gains(labels)[:, None, :]).sum(-1)
        places = torch.arange(1, labels.shape[-1] + 1, device=labels.device, dtype=labels.dtype)
        ndcg = (gains * discounts(places))[:, : self.k].sum(-1)
        return (1 - ndcg) * has_order(labels, kept)


def soft_permutation(scores: Tensor, kept: Tensor) -> Tensor:
    """Return for each rank how much of each passage stands on it [queries, ranks, passages]; 0 behind the list."""
    size = kept.sum(-1)[:, None]
    ranks = torch.arange(1, kept.shape[-1] + 1, device=kept.device)
    cells = (ranks <= size)[:, :, None] & kept[:, None, :]
    spread = ((scores[:, :, None] - scores[:, None, :]).abs() * kept[:, None, :]).sum(-1)
    logs = (size + 1 - 2 * ranks)[:, :, None] * scores[:, None, :] - spread[:, None, :]
    lowest = torch.finfo(scores.dtype).min
    logs = logs.masked_fill(~cells, lowest).log_softmax(-1)
    for _ in range(SINKHORN_ROUNDS):
        for side in (-2, -1):
            logs = logs.masked_fill(~cells, lowest)
            logs = logs - logs.logsumexp(side, keepdim=True)
    return logs.exp().masked_fill(~cells, 0.0)

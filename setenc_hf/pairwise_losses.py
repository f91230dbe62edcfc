"""Losses of pairs of passages: RankNet, MarginMSE and the LambdaLoss framework."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .loss_base import GainLoss, ListwiseLoss, count_above, discounts, has_order, mean_ranks, ordered_pairs

WEIGHTINGS = ("none", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp")


class RankNetLoss(ListwiseLoss):
    r"""Logistic loss of every pair: $\frac{1}{|Q|}\sum_{(i,j) \in Q} \log(1 + e^{s_j - s_i})$, $Q = \{y_i > y_j\}$.

    Burges et al. 2005, "Learning to rank using gradient descent"; for an LLM's order as in RankGPT (arXiv
    2304.09542). The mean over the pairs of a list makes long and short lists count the same.
    """

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        pairs = ordered_pairs(labels, kept)
        losses = softplus(scores[:, None, :] - scores[:, :, None]) * pairs
        return losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


class MarginMSELoss(ListwiseLoss):
    r"""Squared error of the margins: $\frac{1}{|Q|}\sum_{i<j} ((s_i - s_j) - (y_i - y_j))^2$ over all pairs.

    Hofstätter et al. 2020 (arXiv 2010.02666), over every pair of the list instead of one positive and one negative.
    """

    needs = ("score", "relevance")

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        errors = scores - labels
        pairs = kept[:, :, None] & kept[:, None, :] & ~torch.eye(kept.shape[1], dtype=torch.bool, device=kept.device)
        losses = (errors[:, :, None] - errors[:, None, :]).square() * pairs
        return losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


class LambdaLoss(GainLoss):
    r"""Weighted loss of pairs, bounding nDCG: $\frac{1}{|Q|}\sum_{(i,j) \in Q} w_{ij} \log_2(1 + e^{s_j - s_i})$.

    With $G_i$ the gain over the ideal DCG@k, $r_i$ the rank by the model's scores and $d(r) = 1 / \log_2(1 + r)$, the
    weight is, by `weighting`,

    - `none`: $1$;
    - `ndcg1`: $G_i\, d(r_i)$, over all pairs, not only those of $y_i > y_j$;
    - `ndcg2`: $\delta_{ij} |G_i - G_j|$ with $\delta_{ij} = d(|r_i - r_j|) - d(|r_i - r_j| + 1)$;
    - `lambdarank`: $|d(r_i) - d(r_j)|\, |G_i - G_j|$;
    - `ndcg2pp`: $(\mu\, \delta_{ij} + |d(r_i) - d(r_j)|)\, |G_i - G_j|$, NDCGLoss2++.

    Wang et al. 2018, "The LambdaLoss framework for ranking metric optimization". With `k`, a pair counts where one of
    the two stands in the model's top k (their equation 18). Passages of one score share the mean of their ranks and
    count as neighbours, whatever order they came in. sentence-transformers' and allRank's losses of this name take
    the mean over the pairs of a whole batch (or their sum); here it is over the pairs of a list, then over lists.

    Args:
        weighting: one of the above.
        mu: the weight $\mu$ of `ndcg2pp`.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        weighting: str = "ndcg2pp",
        k: int | None = None,
        mu: float = 10.0,
        gain: str = "exponential",
    ) -> None:
        super().__init__(temperature, k, gain)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"`weighting` is one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        if mu < 0:
            raise ValueError(f"`mu` must be at least 0, got {mu}")
        self.weighting, self.mu = weighting, mu
        if weighting == "none":  # then gains play no part
            self.needs = ListwiseLoss.needs

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        if self.weighting == "ndcg1":
            pairs = (kept[:, :, None] & kept[:, None, :]) * has_order(labels, kept).bool()[:, None, None]
        else:
            pairs = ordered_pairs(labels, kept)
        with torch.no_grad():
            if self.k is not None:
                is_top = count_above(scores, kept)[0] < self.k
                pairs = pairs & (is_top[:, :, None] | is_top[:, None, :])
            weights = self.weights(self.gains(labels), mean_ranks(scores, kept)) * pairs
        losses = softplus(scores[:, None, :] - scores[:, :, None]) * weights
        return losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1) / math.log(2)

    def weights(self, gains: Tensor, ranks: Tensor) -> Tensor | float:
        """Return the weight of each pair, [queries, longest list, longest list]."""
        if self.weighting == "none":
            return 1.0
        if self.weighting == "ndcg1":
            return (gains * discounts(ranks))[:, :, None]
        apart = (ranks[:, :, None] - ranks[:, None, :]).abs().clamp(min=1)
        by_distance = discounts(apart) - discounts(apart + 1)
        by_ranks = (discounts(ranks)[:, :, None] - discounts(ranks)[:, None, :]).abs()
        weights = {
            "ndcg2": by_distance,
            "lambdarank": by_ranks,
            "ndcg2pp": self.mu * by_distance + by_ranks,
        }[self.weighting]
        return weights * (gains[:, :, None] - gains[:, None, :]).abs()

"""Ranking and distillation losses: `(scores, labels) -> scalar`, both [queries, longest list].

Every loss is a mean over the lists of a batch of a value that depends on one list alone, so that one batch of four
lists equals four batches of one. A list that teaches nothing (all labels equal, one passage) costs 0. Losses are
computed in float32 whatever the scores' type.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .samples import IGNORE_LABEL


class ListwiseLoss(nn.Module):
    """A mean over lists; subclasses give each list's own value.

    Args:
        temperature: divides the scores first.
    """

    needs: tuple[str, ...] = ("relevance", "rank", "score")  # the kinds of labels the loss can use

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}")
        self.temperature = temperature

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of `scores` against `labels`, both [queries, longest list]; ignored labels are padding."""
        if scores.shape != labels.shape:
            raise ValueError(f"scores are {tuple(scores.shape)} but labels {tuple(labels.shape)}; they must align")
        kept = labels.ne(IGNORE_LABEL)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        # what stands behind a list (-inf) must reach no arithmetic: its gradient would be NaN
        scores = scores.to(dtype).masked_fill(~kept, 0.0) / self.temperature
        return self.list_losses(scores, labels.to(dtype).masked_fill(~kept, 0.0), kept).mean()

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        """Return each list's loss [queries]; `scores` and `labels` are 0 where `kept` is false."""
        raise NotImplementedError


class InfoNCELoss(ListwiseLoss):
    r"""Contrastive loss of each relevant passage against the list's non-relevant ones.

    $-\frac{1}{|P|}\sum_{p \in P} \log \frac{e^{s_p}}{e^{s_p} + \sum_{n \in N} e^{s_n}}$ with $P$ the passages of a
    label above 0 and $N$ those of a label of 0 or below (van den Oord et al. 2018, arXiv 1807.03748; as the
    localized contrastive estimation of Gao et al. 2021, arXiv 2101.08751). A list without either costs 0.
    """

    needs = ("relevance",)

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        positives = labels.gt(0) & kept
        negatives = labels.le(0) & kept
        # -inf in a row without negatives makes softplus(-inf) = 0: nothing to tell apart, no cost, no gradient
        against = scores.masked_fill(~negatives, torch.finfo(scores.dtype).min).logsumexp(-1, keepdim=True)
        losses = softplus(against - scores) * (positives & negatives.any(-1, keepdim=True))
        return losses.sum(-1) / positives.sum(-1).clamp(min=1)


class RankNetLoss(ListwiseLoss):
    r"""Logistic loss of every pair: $\frac{1}{|Q|}\sum_{(i,j) \in Q} \log(1 + e^{s_j - s_i})$, $Q = \{y_i > y_j\}$.

    Burges et al. 2005, "Learning to rank using gradient descent"; for an LLM's order as in RankGPT (arXiv
    2304.09542). The mean over the pairs of a list makes long and short lists count the same.
    """

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        pairs = (labels[:, :, None] > labels[:, None, :]) & kept[:, :, None] & kept[:, None, :]
        losses = softplus(scores[:, None, :] - scores[:, :, None]) * pairs
        return losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


class ListNetLoss(ListwiseLoss):
    r"""Cross-entropy of the top-one distributions: $-\sum_i \mathrm{softmax}(y)_i \log \mathrm{softmax}(s)_i$.

    Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach". A list of equal labels costs 0.
    """

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        log_scores, log_labels = _log_softmax(scores, kept), _log_softmax(labels, kept)
        return -(log_labels.exp() * log_scores * kept).sum(-1) * _has_order(labels, kept)


class KLDivergenceLoss(ListwiseLoss):
    r"""Distance to the teacher's distribution: $\sum_i p_i (\log p_i - \log q_i)$, $p = \mathrm{softmax}(y/T)$,
    $q = \mathrm{softmax}(s/T)$.

    Hinton et al. 2015 (arXiv 1503.02531), for rankers as in arXiv 2010.11386. For labels that are scores, which the
    temperature $T$ divides as well; equal scores are a distribution to learn like any other.
    """

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        log_scores, log_labels = _log_softmax(scores, kept), _log_softmax(labels / self.temperature, kept)
        return (log_labels.exp() * (log_labels - log_scores) * kept).sum(-1)


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


def _log_softmax(values: Tensor, kept: Tensor) -> Tensor:
    """Return log-softmax over the kept values, 0 at the others (their finite stand-in for -inf)."""
    lowest = torch.finfo(values.dtype).min
    return values.masked_fill(~kept, lowest).log_softmax(-1).masked_fill(~kept, 0.0)


def _has_order(labels: Tensor, kept: Tensor) -> Tensor:
    """Return 1 for lists with two different labels, 0 for the others [queries]."""
    highest = labels.masked_fill(~kept, -torch.inf).amax(-1)
    lowest = labels.masked_fill(~kept, torch.inf).amin(-1)
    return (highest > lowest).to(labels.dtype)


LOSSES: dict[str, Callable[..., ListwiseLoss]] = {
    "infonce": InfoNCELoss,
    "ranknet": RankNetLoss,
    "listnet": ListNetLoss,
    "kl_divergence": KLDivergenceLoss,
    "margin_mse": MarginMSELoss,
}

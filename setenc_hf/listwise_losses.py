"""Losses of a list's distribution: InfoNCE, ListNet, KL divergence, ListMLE and P-ListMLE, Pearson's correlation."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .loss_base import ListwiseLoss, count_above, has_order, log_softmax, ordered_pairs


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


class ListNetLoss(ListwiseLoss):
    r"""Cross-entropy of the top-one distributions: $-\sum_i \mathrm{softmax}(y)_i \log \mathrm{softmax}(s)_i$.

    Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach". A list of equal labels costs 0.
    """

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        log_scores, log_labels = log_softmax(scores, kept), log_softmax(labels, kept)
        return -(log_labels.exp() * log_scores * kept).sum(-1) * has_order(labels, kept)


class KLDivergenceLoss(ListwiseLoss):
    r"""Distance to the teacher's distribution: $\sum_i p_i (\log p_i - \log q_i)$, $p = \mathrm{softmax}(y/T)$,
    $q = \mathrm{softmax}(s/T)$.

    Hinton et al. 2015 (arXiv 1503.02531), for rankers as in arXiv 2010.11386. For labels that are scores, which the
    temperature $T$ divides as well; equal scores are a distribution to learn like any other.
    """

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        log_scores, log_labels = log_softmax(scores, kept), log_softmax(labels / self.temperature, kept)
        return (log_labels.exp() * (log_labels - log_scores) * kept).sum(-1)


class ListMLELoss(ListwiseLoss):
    r"""Negative log-likelihood of the order: $-\sum_i \log \frac{e^{s_i}}{e^{s_i} + \sum_{j: y_j < y_i} e^{s_j}}$.

    Xia et al. 2008, "Listwise approach to learning to rank: theory and algorithm" (the Plackett-Luce model). Without
    ties this is their loss. Passages of one label do not compete, so that no order among them is taught, and a list
    of equal labels costs 0; sentence-transformers and allRank teach some order of them, the given or a drawn one.
    """

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        return (self.place_weights(labels, kept) * self.place_losses(scores, labels, kept)).sum(-1)

    def place_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        """Return the negative log-likelihood of each passage against those of lower labels [queries, longest list]."""
        below = ordered_pairs(labels, kept)
        lowest = torch.finfo(scores.dtype).min
        against = scores[:, None, :].expand_as(below).masked_fill(~below, lowest).logsumexp(-1)
        return softplus(against - scores) * below.any(-1)

    def place_weights(self, labels: Tensor, kept: Tensor) -> Tensor:
        return torch.ones_like(labels)


class PListMLELoss(ListMLELoss):
    r"""ListMLE with the top of the list weighing more: the term of rank $r$ of $n$ by $2^{n-r} - 1$.

    The weights of a list add up to 1, as in sentence-transformers. Lan et al. 2014, "Position-aware ListMLE: a
    sequential learning process for ranking". Passages of one label share the mean weight of the ranks they stand on.
    """

    def place_weights(self, labels: Tensor, kept: Tensor) -> Tensor:
        above, equal = count_above(labels, kept)
        # over 2^n, which would overflow: 2^-r - 2^-n, the first summed in closed form over the ranks of a tie
        weights = ((-above).exp2() - (-above - equal).exp2()) / equal - (-kept.sum(-1, keepdim=True).to(labels)).exp2()
        weights = weights * kept
        return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(labels.dtype).tiny)


class PearsonLoss(ListwiseLoss):
    r"""One minus the correlation of scores and labels.

    $1 - \frac{\sum_i (s_i - \bar s)(y_i - \bar y)}{\|s - \bar s\| \|y - \bar y\|}$ (Pearson 1895); as a distillation
    loss, Huang et al. 2022, "Knowledge distillation from a stronger teacher" (arXiv 2205.10536). It sees neither the
    scale nor the offset of the scores, so that it has no temperature. A list of equal labels costs 0.
    """

    def __init__(self) -> None:
        super().__init__()

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        scores, labels = _unit(scores, kept), _unit(labels, kept)
        return (1 - (scores * labels).sum(-1)) * has_order(labels, kept)


def _unit(values: Tensor, kept: Tensor) -> Tensor:
    """Return centred lists of length 1; of length 0 where all values are equal."""
    size = kept.sum(-1, keepdim=True).clamp(min=1)
    values = (values - values.sum(-1, keepdim=True) / size).masked_fill(~kept, 0.0)
    # below this spread the correlation says nothing, and its gradient would be without bounds
    return values / torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp(min=1e-3)

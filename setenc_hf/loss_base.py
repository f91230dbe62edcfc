"""What every ranking loss stands on: a masked mean over lists, and the ranks and gains that metrics are made of."""

import inspect

import torch
from torch import Tensor, nn

from .samples import IGNORE_LABEL

GAINS = ("exponential", "linear")


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

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """Return what the loss can be told, by name."""
        return dict(inspect.signature(cls).parameters)


class GainLoss(ListwiseLoss):
    """A loss made of nDCG's gains.

    Args:
        k: the cut of the measure; the default is the whole list.
        gain: `exponential`, $2^y - 1$, for grades of relevance; or `linear`, $y$, which takes a teacher's ranks too.
    """

    def __init__(self, temperature: float = 1.0, k: int | None = None, gain: str = "exponential") -> None:
        super().__init__(temperature)
        if k is not None and k < 1:
            raise ValueError(f"`k` must be at least 1 passage, got {k}")
        if gain not in GAINS:
            raise ValueError(f"`gain` is one of {', '.join(GAINS)}, got {gain!r}")
        self.k, self.gain = k, gain
        self.needs = ("relevance",) if gain == "exponential" else ("relevance", "rank")

    def gains(self, labels: Tensor) -> Tensor:
        """Return gains [queries, longest list] over the ideal DCG@k, so that the best order's DCG@k is 1.

        Labels below 0 gain nothing. A list without gains has 0 everywhere. Exponential gains are taken relative to
        the list's highest label, so that no label overflows.
        """
        labels = labels.clamp(min=0)
        if self.gain == "exponential":
            highest = labels.amax(-1, keepdim=True)
            labels = (labels - highest).exp2() - (-highest).exp2()
        best_first = labels.sort(-1, descending=True).values
        places = torch.arange(1, labels.shape[-1] + 1, device=labels.device, dtype=labels.dtype)
        ideal = (best_first * discounts(places))[:, : self.k].sum(-1, keepdim=True)
        return labels / ideal.clamp(min=torch.finfo(labels.dtype).tiny)


def discounts(ranks: Tensor) -> Tensor:
    """Return nDCG's discount of ranks from 1: $1 / log_2(1 + r)$."""
    return 1 / (1 + ranks).log2()


def count_above(values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each value of a list how many are higher, and how many are equal, itself among them."""
    higher = (values[:, None, :] > values[:, :, None]) & kept[:, None, :]
    equal = (values[:, None, :] == values[:, :, None]) & kept[:, None, :]
    return higher.sum(-1).to(values.dtype), equal.sum(-1).to(values.dtype).clamp(min=1)


def mean_ranks(values: Tensor, kept: Tensor) -> Tensor:
    """Return ranks from 1, the highest value first; equal values share the mean of the ranks they stand on."""
    above, equal = count_above(values, kept)
    return above + (equal + 1) / 2


def approximate_ranks(scores: Tensor, kept: Tensor) -> Tensor:
    r"""Return differentiable ranks: $1 + \sum_{j \ne i} \sigma(s_j - s_i)$.

    Qin et al. 2010, "A general approximation framework for direct optimization of information retrieval measures".
    """
    is_other = kept[:, None, :] & ~torch.eye(kept.shape[1], dtype=torch.bool, device=kept.device)
    return 1 + ((scores[:, None, :] - scores[:, :, None]).sigmoid() * is_other).sum(-1)


def log_softmax(values: Tensor, kept: Tensor) -> Tensor:
    """Return log-softmax over the kept values, 0 at the others (their finite stand-in for -inf)."""
    lowest = torch.finfo(values.dtype).min
    return values.masked_fill(~kept, lowest).log_softmax(-1).masked_fill(~kept, 0.0)


def ordered_pairs(labels: Tensor, kept: Tensor) -> Tensor:
    """Return which pairs (i, j) of a list have label i above label j, bool [queries, longest list, longest list]."""
    return (labels[:, :, None] > labels[:, None, :]) & kept[:, :, None] & kept[:, None, :]


def has_order(labels: Tensor, kept: Tensor) -> Tensor:
    """Return 1 for lists with two different labels, 0 for the others [queries]."""
    highest = labels.masked_fill(~kept, -torch.inf).amax(-1)
    lowest = labels.masked_fill(~kept, torch.inf).amin(-1)
    return (highest > lowest).to(labels.dtype)

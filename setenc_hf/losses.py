"""Ranking losses by name, and mixtures of them: `(scores, labels) -> scalar`, both [queries, longest list].

Every loss is a mean over the lists of a batch of a value that depends on one list alone, so that one batch of four
lists equals four batches of one. A list that teaches nothing (one passage; all labels equal, but for `kl_divergence`
and `margin_mse`, to which equal scores of a teacher say something) costs 0. Losses are computed in float32 whatever
the scores' type.

A recipe names a loss, with options in brackets, or several that are added up with weights:

    ranknet
    lambdaloss(weighting=ndcg2pp, k=10) + 0.5 * infonce(temperature=0.05)
"""

import inspect
import re
import typing
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .errors import InputError, nearest
from .listwise_losses import InfoNCELoss, KLDivergenceLoss, ListMLELoss, ListNetLoss, PearsonLoss, PListMLELoss
from .loss_base import ListwiseLoss
from .metric_losses import ADRMSELoss, ApproxMRRLoss, ApproxNDCGLoss, NeuralNDCGLoss
from .pairwise_losses import LambdaLoss, MarginMSELoss, RankNetLoss

LOSSES: dict[str, type[ListwiseLoss]] = {
    "infonce": InfoNCELoss,
    "ranknet": RankNetLoss,
    "listnet": ListNetLoss,
    "kl_divergence": KLDivergenceLoss,
    "margin_mse": MarginMSELoss,
    "lambdaloss": LambdaLoss,
    "listmle": ListMLELoss,
    "p_listmle": PListMLELoss,
    "approx_ndcg": ApproxNDCGLoss,
    "approx_mrr": ApproxMRRLoss,
    "adr_mse": ADRMSELoss,
    "neural_ndcg": NeuralNDCGLoss,
    "pearson": PearsonLoss,
}
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
TERM = re.compile(rf"\s*(?:(?P<weight>{NUMBER})\s*\*\s*)?(?P<name>[A-Za-z]\w*)\s*(?:\((?P<options>[^()]*)\)\s*)?")
EXAMPLE = "'ranknet + 0.5 * infonce(temperature=0.05)'"


class MixtureLoss(ListwiseLoss):
    r"""A weighted sum of losses: $\sum_m w_m L_m(s, y)$.

    Args:
        terms: (weight, loss) of each.
    """

    def __init__(self, terms: Sequence[tuple[float, ListwiseLoss]]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in terms]
        self.losses = [loss for _, loss in terms]
        # what any of them cannot use, the mixture cannot
        self.needs = tuple(kind for kind in ListwiseLoss.needs if all(kind in loss.needs for loss in self.losses))

    def list_losses(self, scores: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        return sum(  # type: ignore[return-value]
            weight * loss.list_losses(scores / loss.temperature, labels, kept)
            for weight, loss in zip(self.weights, self.losses)
        )


def parse_loss(text: str, temperature: float = 1.0) -> ListwiseLoss:
    """Return the loss that `text` names; see the module.

    Args:
        text: `[weight *] name[(option=value, ...)]`, several joined by `+`.
        temperature: of every loss that has one and does not name its own.

    Raises `InputError` for what is no such text, and for an unknown loss or option, with the nearest one that exists.
    """
    terms = []
    place = 0
    while True:
        term = TERM.match(text, place)
        if term is None:
            where = f"at {text[place:].strip()!r}" if text[place:].strip() else "at its end"
            raise InputError(f"loss {text!r}: expected the name of a loss {where}, as in {EXAMPLE}")
        weight = float(term["weight"] or 1)
        if not weight > 0:
            raise InputError(f"loss {text!r}: the weight of {term['name']!r} must be above 0, got {term['weight']}")
        terms.append((weight, _one_loss(term["name"], term["options"] or "", temperature)))
        place = term.end()
        if place == len(text):
            break
        if text[place] != "+":
            raise InputError(f"loss {text!r}: expected '+' or the end at {text[place:]!r}, as in {EXAMPLE}")
        place += 1
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else MixtureLoss(terms)


def _one_loss(name: str, options: str, temperature: float) -> ListwiseLoss:
    if name not in LOSSES:
        raise InputError(f"loss {name!r}: no such loss{nearest(name, list(LOSSES))} (there are {', '.join(LOSSES)})")
    kind = LOSSES[name]
    known = kind.options()
    given: dict[str, Any] = {"temperature": temperature} if "temperature" in known else {}
    for part in options.split(",") if options.strip() else []:
        option, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value:
            raise InputError(f"loss {name!r}: an option is written name=value, got {part.strip()!r}")
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"loss {name!r}: no option {option!r}{nearest(option, list(known))} ({has})")
        given[option] = _read(name, option, value, known[option])
    try:
        return kind(**given)
    except ValueError as error:
        raise InputError(f"loss {name!r}: {error}") from None


def _read(name: str, option: str, value: str, parameter: inspect.Parameter) -> Any:
    """Return an option's value in the type that the loss declares."""
    kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
    (kind,) = (kind for kind in kinds if kind is not type(None))
    try:
        return kind(value)
    except ValueError:
        word = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"loss {name!r}: `{option}` is {word}, got {value!r}") from None

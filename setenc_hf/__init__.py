"""Fine-tune and run Set-Encoders: permutation-invariant listwise passage re-rankers.

Names are imported when they are first used, so that commands which need no model start at once. Whenever transformers
is used beside this package, its Auto classes know Set-Encoders and `pipeline("text-ranking")` exists.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._registration import register_with_transformers

if TYPE_CHECKING:
    from .configuration import SetEncoderConfig
    from .lists import EvaluationLists, ListwiseCollator, TrainingLists
    from .modeling import SetEncoderForReranking
    from .pipeline import TextRankingPipeline
    from .samples import ListwiseSamples
    from .tokenization import SetEncoderTokenizer
    from .trainer import ListwiseTrainer, ListwiseTrainingArguments

__version__ = "0.1.0"

_MODULES = {
    "SetEncoderConfig": "configuration",
    "SetEncoderForReranking": "modeling",
    "SetEncoderTokenizer": "tokenization",
    "TextRankingPipeline": "pipeline",
    "ListwiseSamples": "samples",
    "TrainingLists": "lists",
    "EvaluationLists": "lists",
    "ListwiseCollator": "lists",
    "ListwiseTrainer": "trainer",
    "ListwiseTrainingArguments": "trainer",
}
__all__ = [
    "EvaluationLists",
    "ListwiseCollator",
    "ListwiseSamples",
    "ListwiseTrainer",
    "ListwiseTrainingArguments",
    "SetEncoderConfig",
    "SetEncoderForReranking",
    "SetEncoderTokenizer",
    "TextRankingPipeline",
    "TrainingLists",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()

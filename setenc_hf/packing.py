"""Lists of passages as one sequence of tokens without padding, in an order that the caller's order cannot change."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Ids = Sequence[int] | np.ndarray  # token ids, without special tokens


@dataclass(frozen=True)
class Template:
    """The special tokens around a query and a passage: `[CLS] [INT] query [SEP] passage [SEP]`.

    In memory the interaction token comes first, so that the other tokens of a passage are one slice; each token keeps
    its own position, which is all that the model sees.
    """

    cls_id: int
    sep_id: int
    int_id: int | None  # None: [CLS] is the interaction token, or there is none

    @property
    def head(self) -> list[int]:
        """The tokens before the query, in memory order."""
        return [self.cls_id] if self.int_id is None else [self.int_id, self.cls_id]

    @property
    def num_special(self) -> int:
        """How many tokens a passage's sequence has beside those of the query and the passage."""
        return len(self.head) + 2


def pack(queries: Sequence[Ids], passages: Sequence[Sequence[Ids]], template: Template) -> dict[str, Tensor]:
    """Pack the passages of each query into one sequence.

    The passages of a list are ordered by length and then by their tokens, so that the model computes the same numbers
    in the same places whatever order they came in, and passages of equal length lie side by side.

    Args:
        queries: the token ids of each query, already cut.
        passages: for each query the token ids of its passages, already cut.
        template: the special tokens.

    Returns:
        `input_ids`, `position_ids`, `token_type_ids`, each [1, tokens]; `passage_lengths` [passages], tokens of each
        passage in packed order; `num_passages` [queries]; `restore` [passages], for each passage in the caller's
        order its place in packed order (equal passages share a place, so that their scores are equal to the bit).
    """
    head = template.head
    input_ids: list[int] = []
    token_types: list[int] = []
    lengths: list[int] = []
    restore: list[int] = []
    for query, texts in zip(queries, passages, strict=True):
        before = [*head, *query, template.sep_id]
        keys = [(len(text), text.tolist() if isinstance(text, np.ndarray) else list(text)) for text in texts]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        places = [0] * len(keys)
        previous = -1
        for place, index in enumerate(order, start=len(lengths)):
            length, text = keys[index]
            is_repeated = previous >= 0 and keys[previous] == keys[index]
            places[index] = places[previous] if is_repeated else place
            previous = index
            input_ids += before
            input_ids += text
            input_ids.append(template.sep_id)
            token_types += [0] * len(before)
            token_types += [1] * (length + 1)
        lengths += [len(before) + keys[index][0] + 1 for index in order]
        restore += places
    sizes = torch.tensor(lengths, dtype=torch.long)
    return {
        "input_ids": torch.tensor([input_ids], dtype=torch.long),
        "position_ids": _positions(sizes, swapped=template.int_id is not None)[None],
        "token_type_ids": torch.tensor([token_types], dtype=torch.long),
        "passage_lengths": sizes,
        "num_passages": torch.tensor([len(texts) for texts in passages], dtype=torch.long),
        "restore": torch.tensor(restore, dtype=torch.long),
    }


def _positions(lengths: Tensor, swapped: bool) -> Tensor:
    """Return each token's position in its own passage [tokens]; `swapped`: [INT] (1) lies before [CLS] (0)."""
    ends = lengths.cumsum(0)
    starts = ends - lengths
    positions = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    if swapped:
        positions[starts], positions[starts + 1] = 1, 0
    return positions


def unpack(scores: Tensor, num_passages: Tensor, restore: Tensor, padding: float) -> Tensor:
    """Return packed scores [passages] as [queries, longest list] in the caller's order, `padding` behind each list."""
    longest = int(num_passages.max()) if len(num_passages) else 0
    is_passage = torch.arange(longest, device=scores.device) < num_passages.to(scores.device)[:, None]
    unpacked = scores.new_full((len(num_passages), longest), padding)
    return unpacked.masked_scatter(is_passage, scores[restore])

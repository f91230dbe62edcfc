"""Inter-passage attention (arXiv 2404.06912, section 3) over packed passages, for transformers' attention interface.

The keys a passage attends to are its own tokens and the interaction token of every other passage of its query. Seen
from its interaction token the same set is: its own tokens but the interaction token, and *all* interaction tokens of
the list, its own among them. Both parts need no mask and no copy of a key: the first is a slice of the packed
sequence, the second is shared by the whole list. They are computed one after the other and merged by their
log-sum-exps, as in blockwise attention; the backward pass runs per part with the merged output and log-sum-exp.
"""

import math
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from . import varlen_attention
from .varlen_attention import VarlenAttention

# "sdpa" in the name makes transformers refuse encoders that do not support replaceable attention. Each copy of this
# file (a model's own code, beside the package) takes a name of its own: it knows only its own classes of chunks.
_TAKEN = AttentionInterface().valid_keys()
ATTENTION = next(name for number in count() if (name := f"setenc_sdpa{number or ''}") not in _TAKEN)
MOST_WEIGHTS = 1 << 26  # of attention written out at once: 256 MiB in float32


class Run(NamedTuple):
    """Passages of equal length that lie side by side in one list."""

    passage: int  # the first one's place in the chunk
    token: int  # its first token in the chunk
    size: int  # how many passages
    length: int  # tokens of each


class Part(NamedTuple):
    """The passages of one list that lie in one chunk."""

    runs: list[Run]
    tokens: slice  # in the chunk
    passages: slice  # in the chunk
    shared: slice  # the rows of the whole list's interaction tokens among those of the batch
    before: int  # how many passages of the list lie in earlier chunks

    def query_rows(self, cls_only: bool) -> slice:
        """Return the rows of the queries: one a passage where only `[CLS]` is computed, else all tokens."""
        return self.passages if cls_only else self.tokens


Shared = tuple[Tensor, Tensor]  # keys and values of interaction tokens, [shared rows, heads, dim] each


@dataclass
class SetLayout:
    """Where the passages and lists of a packed batch lie, and how a layer works through them chunk by chunk.

    Args:
        lengths: tokens of each passage, in packed order.
        list_sizes: passages of each list.
        interaction: `int`, `cls` or `none`, as in the configuration; the interaction token is a passage's first.
        fill_to: draw interaction tokens for lists of fewer passages, up to this many; 0 draws none.
        normalize: let the interaction tokens of a list weigh as much as one token, however many they are.
        device: where the row numbers are needed.
        max_tokens: tokens that a layer works on at a time, never less than one passage; `None`: all.
    """

    lengths: list[int]
    list_sizes: list[int]
    interaction: str
    fill_to: int
    normalize: bool
    device: torch.device
    max_tokens: int | None = None
    first_rows: Tensor = field(init=False)  # [passages], the interaction token of each passage where there is one
    chunks: list["Chunk"] = field(init=False)

    def __post_init__(self) -> None:
        self.first_rows = _starts(self.lengths).to(self.device)
        self.chunks = [Chunk(self, passages) for passages in self._plan()]

    def _plan(self) -> Iterator[slice]:
        """Yield the passages of each chunk: as few chunks as the limit allows, of about equal size."""
        total = sum(self.lengths)
        count = 1 if self.max_tokens is None else -(-total // self.max_tokens)
        limit = -(-total // max(count, 1)) + max(self.lengths, default=0)
        if self.max_tokens is not None:
            limit = min(limit, self.max_tokens)
        start = tokens = 0
        for passage, length in enumerate(self.lengths):
            if passage > start and tokens + length > limit:
                yield slice(start, passage)
                start, tokens = passage, 0
            tokens += length
        yield slice(start, len(self.lengths))

    def discount(self, shared: slice) -> float:
        """Return what is taken off the logits of a list's interaction tokens: the logarithm of their number, or 0."""
        return math.log(max(shared.stop - shared.start, 1)) if self.normalize else 0.0


class Chunk:
    """Some passages of a batch, which one layer computes together: what its attention is given as `set_layout`.

    Args:
        layout: of the whole batch.
        passages: which of its passages.
        shared: keys and values of all interaction tokens of the batch; `None` where the chunk holds the whole batch
            and so has them itself.
    """

    def __init__(self, layout: SetLayout, passages: slice, shared: Shared | None = None) -> None:
        self.layout, self.shared = layout, shared
        self.is_used = False  # set by the attention: what proves that set attention was on
        self.cls_only = False  # set by the last layer, of which only `[CLS]` is scored
        self.passages = passages
        self.lengths = layout.lengths[passages]
        first_token = sum(layout.lengths[: passages.start])
        self.tokens = slice(first_token, first_token + sum(self.lengths))
        self.cls_rows = _starts(self.lengths).to(layout.device) + (layout.interaction == "int")  # [passages]
        self.longest = max(self.lengths, default=0)
        self.parts = list(self._parts())

    def with_shared(self, keys: Tensor, values: Tensor) -> "Chunk":
        """Return this chunk with the interaction tokens of the whole batch."""
        chunk = copy(self)
        chunk.shared, chunk.is_used = (keys, values), False
        return chunk

    def _parts(self) -> Iterator[Part]:
        first = shared = token = passage = 0
        for size in self.layout.list_sizes:
            kept = 0 if self.layout.interaction == "none" else max(size, self.layout.fill_to)
            start, stop = max(first, self.passages.start), min(first + size, self.passages.stop)
            if start < stop:
                runs, first_token, first_passage = [], token, passage
                for length, group in groupby(self.layout.lengths[start:stop]):
                    runs.append(Run(passage, token, len(list(group)), length))
                    passage += runs[-1].size
                    token += runs[-1].size * length
                tokens, passages = slice(first_token, token), slice(first_passage, passage)
                yield Part(runs, tokens, passages, slice(shared, shared + kept), start - first)
            first, shared = first + size, shared + kept


class InteractionTokens:
    """In place of a chunk: lets a layer's attention give away the keys and values of interaction tokens, no more."""

    def __init__(self, layout: SetLayout) -> None:
        self.layout = layout
        self.is_used = self.cls_only = False
        self.shared: Shared | None = None
        self.cls_rows = torch.arange(len(layout.lengths), device=layout.device)


def _starts(lengths: list[int]) -> Tensor:
    ends = torch.tensor(lengths, dtype=torch.long).cumsum(0)
    return ends - torch.tensor(lengths, dtype=torch.long)


def set_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    set_layout: Chunk | InteractionTokens | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within passages and across the passages of a list; `query`, `key`, `value`: [1, heads, tokens, dim].

    Returns the output [1, tokens, heads, dim]. Of a chunk marked `cls_only` only the rows of `[CLS]` are computed, the
    others are zero. Raises `RuntimeError` without a layout, since attention over the whole packed
    sequence would mix passages without a word.
    """
    if set_layout is None:
        raise RuntimeError(
            "set attention was called without a layout: call the model through SetEncoderForReranking, not its encoder"
        )
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))  # [tokens, heads, dim]
    layout = set_layout.layout
    set_layout.is_used = True
    if isinstance(set_layout, InteractionTokens):
        set_layout.shared = fill_up(keys, values, layout)
        return torch.zeros_like(queries)[None], None
    cls_only = set_layout.cls_only
    if cls_only:
        queries = queries[set_layout.cls_rows]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if set_layout.shared is not None:
        shared = set_layout.shared
    elif layout.interaction == "none":
        shared = keys[:0], values[:0]
    else:
        shared = fill_up(keys[layout.first_rows], values[layout.first_rows], layout)
    window = sliding_window if sliding_window is not None and set_layout.longest > sliding_window else None
    if dropout == 0 and window is None and queries.device.type == "cpu":
        attended = SplitAttention.apply(queries, keys, values, *shared, set_layout, scale, cls_only)
    elif dropout == 0 and window is None and varlen_attention.is_available(queries):
        attended = VarlenAttention.apply(queries, keys, values, *shared, set_layout, scale, cls_only)
    else:
        attended = plain_attention(queries, keys, values, shared, set_layout, scale, cls_only, dropout, window)
    if cls_only:
        attended = attended.new_zeros(keys.shape).index_copy(0, set_layout.cls_rows, attended)
    return attended[None], None


def fill_up(keys: Tensor, values: Tensor, layout: SetLayout) -> Shared:
    """Return the interaction tokens' keys and values [passages, heads, dim] with those drawn for short lists.

    With `fill_to`, each list of fewer passages gets drawn ones behind its own: the list's mean plus a Gaussian
    combination of its centred states, the same for keys and values, which keeps their joint covariance.
    """
    if not layout.fill_to:
        return keys, values
    filled: tuple[list[Tensor], list[Tensor]] = ([], [])
    for own_keys, own_values in zip(keys.split(layout.list_sizes), values.split(layout.list_sizes)):
        size = len(own_keys)
        weights = torch.randn(max(layout.fill_to - size, 0), size, device=keys.device, dtype=torch.float32)
        weights = (weights / max(size - 1, 1) ** 0.5).to(keys.dtype)
        for states, kept in zip((own_keys, own_values), filled):
            mean = states.mean(0)
            kept += [states, mean + torch.einsum("ds,shf->dhf", weights, states - mean)]
    return torch.cat(filled[0]), torch.cat(filled[1])


def query_rows(run: Run, cls_only: bool) -> slice:
    """Return the rows of a run's queries: one a passage where only `[CLS]` is computed, else all its tokens."""
    if cls_only:
        return slice(run.passage, run.passage + run.size)
    return slice(run.token, run.token + run.size * run.length)


def by_passage(states: Tensor, count: int) -> Tensor:
    """View packed states of equally long passages, [count * length, heads, dim], as [count, heads, length, dim]."""
    return states.unflatten(0, (count, -1)).transpose(1, 2)


def own_states(states: Tensor, run: Run, layout: SetLayout) -> Tensor:
    """View a run's own keys or values without the interaction token, which the shared part holds."""
    rows = by_passage(states[run.token : run.token + run.size * run.length], run.size)
    return rows if layout.interaction == "none" else rows[:, :, 1:]


class SplitAttention(torch.autograd.Function):
    """Both parts by the CPU's flash kernel, merged by log-sum-exp; keeps no attention matrix for the backward pass."""

    @staticmethod
    def forward(ctx, queries, keys, values, shared_keys, shared_values, chunk, scale, cls_only):  # type: ignore[no-untyped-def]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output = torch.empty_like(queries)  # [query rows, heads, dim]
        lse = queries.new_empty(queries.shape[:2], dtype=_accurate(queries.dtype))  # [query rows, heads]
        layout = chunk.layout
        for part in chunk.parts:
            rows, shared = part.query_rows(cls_only), part.shared
            for run in part.runs:
                own = query_rows(run, cls_only)
                alone, alone_lse = attend(
                    by_passage(queries[own], run.size),
                    own_states(keys, run, layout),
                    own_states(values, run, layout),
                    scale=scale,
                )
                by_passage(output[own], run.size).copy_(alone)
                lse[own].unflatten(0, (run.size, -1)).copy_(alone_lse.transpose(1, 2))
            if shared.stop == shared.start:
                continue
            others, others_lse = attend(
                by_passage(queries[rows], 1),
                by_passage(shared_keys[shared], 1),
                by_passage(shared_values[shared], 1),
                scale=scale,
            )
            others, others_lse = others[0].transpose(0, 1), others_lse[0].transpose(0, 1) - layout.discount(shared)
            weight = torch.sigmoid(others_lse - lse[rows])[..., None]
            merged = torch.lerp(output[rows].to(weight.dtype), others.to(weight.dtype), weight)
            output[rows] = merged.to(output.dtype)
            lse[rows] = torch.logaddexp(lse[rows], others_lse)
        ctx.save_for_backward(queries, keys, values, shared_keys, shared_values, output, lse)
        ctx.chunk, ctx.scale, ctx.cls_only = chunk, scale, cls_only
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        # in bfloat16 the kernel takes three times as long as in float32, of which the copies are a small part
        dtype = _accurate(grad.dtype)
        saved = [states.to(dtype) for states in ctx.saved_tensors]
        queries, keys, values, shared_keys, shared_values, output, lse = saved
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        chunk, layout, cls_only = ctx.chunk, ctx.chunk.layout, ctx.cls_only
        given, grad = grad.dtype, grad.to(dtype).contiguous()
        grads = [torch.zeros_like(states) for states in (queries, keys, values, shared_keys, shared_values)]
        grad_queries, grad_keys, grad_values, grad_shared_keys, grad_shared_values = grads

        def share(rows: slice, count: int, own_keys: Tensor, own_values: Tensor, discount: float = 0.0):  # type: ignore[no-untyped-def]
            # with the merged output and log-sum-exp the kernel gives exactly this part's share of the gradient
            return attend_backward(
                by_passage(grad[rows], count),
                by_passage(queries[rows], count),
                own_keys,
                own_values,
                by_passage(output[rows], count),
                (lse[rows] + discount).unflatten(0, (count, -1)).transpose(1, 2),
                0.0,
                False,
                scale=ctx.scale,
            )

        for part in chunk.parts:
            rows, shared = part.query_rows(cls_only), part.shared
            for run in part.runs:
                own = query_rows(run, cls_only)
                dq, dk, dv = share(own, run.size, own_states(keys, run, layout), own_states(values, run, layout))
                by_passage(grad_queries[own], run.size).copy_(dq)
                own_states(grad_keys, run, layout).copy_(dk)
                own_states(grad_values, run, layout).copy_(dv)
            if shared.stop > shared.start:
                shared_states = by_passage(shared_keys[shared], 1), by_passage(shared_values[shared], 1)
                dq, dk, dv = share(rows, 1, *shared_states, layout.discount(shared))
                by_passage(grad_queries[rows], 1).add_(dq)
                by_passage(grad_shared_keys[shared], 1).copy_(dk)
                by_passage(grad_shared_values[shared], 1).copy_(dv)
        return *(states.to(given) for states in grads), None, None, None


def plain_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shared: Shared,
    chunk: Chunk,
    scale: float,
    cls_only: bool,
    dropout: float,
    window: int | None,
) -> Tensor:
    """The same attention with its weights written out: for dropout on them, sliding windows and other devices.

    Within a window a token sees the tokens of its passage that are less than `window` positions away; the interaction
    tokens of the other passages have no place in the passage and are seen from everywhere.
    """
    outputs = []
    layout = chunk.layout
    for part in chunk.parts:
        shared_keys, shared_values = (by_passage(states[part.shared], 1) for states in shared)
        for run in pieces(part.runs, shared_keys.shape[1] * shared_keys.shape[2], shared_keys.shape[1], cls_only):
            run_queries = by_passage(queries[query_rows(run, cls_only)], run.size)  # [passages, heads, rows, dim]
            own_keys, own_values = own_states(keys, run, layout), own_states(values, run, layout)
            to_shared = run_queries @ shared_keys.mT.expand(run.size, -1, -1, -1) * scale - layout.discount(part.shared)
            weights = torch.cat([run_queries @ own_keys.mT * scale, to_shared], dim=-1)
            weights = weights.to(_accurate(weights.dtype))
            if window is not None:
                place = part.before + run.passage - part.passages.start  # in the list
                hidden = _outside_window(run, place, weights.shape[-1], layout, window, cls_only)
                weights = weights.masked_fill(hidden, -torch.inf)
            weights = nn.functional.dropout(weights.softmax(-1).to(queries.dtype), dropout, training=dropout > 0)
            own, others = weights.split([own_keys.shape[2], shared_keys.shape[2]], dim=-1)
            output = own @ own_values + others @ shared_values
            outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def pieces(runs: Iterable[Run], shared_weights: int, heads: int, cls_only: bool) -> Iterator[Run]:
    """Split runs of passages so that the weights of one are no more than `MOST_WEIGHTS`, and never below a passage.

    Args:
        shared_weights: of one query row to the interaction tokens, over all heads.
    """
    for run in runs:
        weights = (1 if cls_only else run.length) * (heads * run.length + shared_weights)
        most = max(MOST_WEIGHTS // weights, 1)
        for first in range(0, run.size, most):
            yield Run(run.passage + first, run.token + first * run.length, min(most, run.size - first), run.length)


def _outside_window(run: Run, place: int, num_keys: int, layout: SetLayout, window: int, cls_only: bool) -> Tensor:
    """Return which keys a window hides: bool [passages, 1, rows, own keys + shared keys]."""
    positions = torch.arange(run.length, device=layout.device)
    if layout.interaction == "int":
        positions[:2] = positions[:2].flip(0)  # [INT], at position 1, lies before [CLS], at 0
    rows = positions[1:2] if cls_only and layout.interaction == "int" else positions[:1] if cls_only else positions
    is_far = (rows[:, None] - positions[None, :]).abs() >= window  # [rows, tokens]
    if layout.interaction == "none":
        return is_far[None, None]
    hidden = torch.zeros(run.size, 1, len(rows), num_keys, dtype=torch.bool, device=layout.device)
    hidden[..., : run.length - 1] = is_far[:, 1:]
    columns = run.length - 1 + place + torch.arange(run.size, device=layout.device)
    passages = torch.arange(run.size, device=layout.device)
    hidden[passages, 0, :, columns] = is_far[:, 0]
    return hidden


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which weights are normalised: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


AttentionInterface.register(ATTENTION, set_attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)  # the layout says what a mask would

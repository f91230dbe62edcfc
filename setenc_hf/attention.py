"""Inter-passage attention (arXiv 2404.06912, section 3) over packed passages, for transformers' attention interface.

The keys a passage attends to are its own tokens and the interaction token of every other passage of its query. Seen
from its interaction token the same set is: its own tokens but the interaction token, and *all* interaction tokens of
the list, its own among them. Both parts need no mask and no copy of a key: the first is a slice of the packed
sequence, the second is shared by the whole list. They are computed one after the other and merged by their
log-sum-exps, as in blockwise attention; the backward pass runs per part with the merged output and log-sum-exp.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

# "sdpa" in the name makes transformers refuse encoders that do not support replaceable attention
ATTENTION = "setenc_sdpa"


class Run(NamedTuple):
    """Passages of equal length that lie side by side in one list."""

    passage: int  # the first one's place
    token: int  # its first token
    size: int  # how many passages
    length: int  # tokens of each


@dataclass
class SetLayout:
    """Where the passages and lists of a packed batch lie; goes with the tokens to every layer's attention.

    Args:
        lengths: tokens of each passage, in packed order.
        list_sizes: passages of each list.
        interaction: `int`, `cls` or `none`, as in the configuration; the interaction token is a passage's first.
        fill_to: draw interaction tokens for lists of fewer passages, up to this many; 0 draws none.
        normalize: let the interaction tokens of a list weigh as much as one token, however many they are.
        device: where the row numbers are needed.
    """

    lengths: list[int]
    list_sizes: list[int]
    interaction: str
    fill_to: int
    normalize: bool
    device: torch.device
    calls: int = 0  # how many layers really used this layout: what proves that set attention was on
    lists: list[list[Run]] = field(init=False)
    first_rows: Tensor = field(init=False)  # [passages], the interaction token of each passage where there is one
    cls_rows: Tensor = field(init=False)  # [passages]

    def __post_init__(self) -> None:
        self.lists = list(self._runs())
        lengths = torch.tensor(self.lengths)
        self.first_rows = (lengths.cumsum(0) - lengths).to(self.device)
        self.cls_rows = self.first_rows + 1 if self.interaction == "int" else self.first_rows

    def discount(self, shared: slice) -> float:
        """Return what is taken off the logits of a list's interaction tokens: the logarithm of their number, or 0."""
        return math.log(max(shared.stop - shared.start, 1)) if self.normalize else 0.0

    def _runs(self) -> Iterator[list[Run]]:
        passage = token = 0
        for size in self.list_sizes:
            runs = []
            for length, group in groupby(self.lengths[passage : passage + size]):
                count = len(list(group))
                runs.append(Run(passage, token, count, length))
                passage += count
                token += count * length
            yield runs


def set_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    set_layout: SetLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within passages and across the passages of a list; `query`, `key`, `value`: [1, heads, tokens, dim].

    Returns the output [1, tokens, heads, dim]. In a layer marked `score_rows_only` only the rows of `[CLS]` are
    computed, the others are zero. Raises `RuntimeError` without a layout, since attention over the whole packed
    sequence would mix passages without a word.
    """
    if set_layout is None:
        raise RuntimeError(
            "set attention was called without a layout: call the model through SetEncoderForReranking, not its encoder"
        )
    set_layout.calls += 1
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))  # [tokens, heads, dim]
    cls_only = getattr(module, "score_rows_only", False)
    if cls_only:
        queries = queries[set_layout.cls_rows]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = shared_states(keys, values, set_layout)
    window = sliding_window if sliding_window is not None and max(set_layout.lengths) > sliding_window else None
    if dropout == 0 and window is None and queries.device.type == "cpu":
        attended = SplitAttention.apply(queries, keys, values, *shared, set_layout, scale, cls_only)
    else:
        attended = plain_attention(queries, keys, values, shared, set_layout, scale, cls_only, dropout, window)
    if cls_only:
        attended = attended.new_zeros(keys.shape).index_copy(0, set_layout.cls_rows, attended)
    return attended[None], None


def shared_states(keys: Tensor, values: Tensor, layout: SetLayout) -> tuple[Tensor, Tensor]:
    """Return the interaction tokens' keys and values, list after list, [shared rows, heads, dim] each.

    With `fill_to`, each list of fewer passages gets drawn ones behind its own: the list's mean plus a Gaussian
    combination of its centred states, the same for keys and values, which keeps their joint covariance.
    """
    if layout.interaction == "none":
        return keys[:0], values[:0]
    keys, values = keys[layout.first_rows], values[layout.first_rows]
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


def list_slices(layout: SetLayout, cls_only: bool) -> Iterator[tuple[list[Run], slice, slice]]:
    """Yield, list by list, its runs, the rows of its queries and the rows of its shared keys."""
    token = passage = shared = 0
    for runs, size in zip(layout.lists, layout.list_sizes):
        tokens = sum(run.size * run.length for run in runs)
        rows = slice(passage, passage + size) if cls_only else slice(token, token + tokens)
        kept = 0 if layout.interaction == "none" else max(size, layout.fill_to)
        yield runs, rows, slice(shared, shared + kept)
        token, passage, shared = token + tokens, passage + size, shared + kept


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
    def forward(ctx, queries, keys, values, shared_keys, shared_values, layout, scale, cls_only):  # type: ignore[no-untyped-def]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output = torch.empty_like(queries)  # [query rows, heads, dim]
        lse = queries.new_empty(queries.shape[:2], dtype=_accurate(queries.dtype))  # [query rows, heads]
        for runs, rows, shared in list_slices(layout, cls_only):
            for run in runs:
                own = query_rows(run, cls_only)
                part, part_lse = attend(
                    by_passage(queries[own], run.size),
                    own_states(keys, run, layout),
                    own_states(values, run, layout),
                    scale=scale,
                )
                by_passage(output[own], run.size).copy_(part)
                lse[own].unflatten(0, (run.size, -1)).copy_(part_lse.transpose(1, 2))
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
        ctx.layout, ctx.scale, ctx.cls_only = layout, scale, cls_only
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        queries, keys, values, shared_keys, shared_values, output, lse = ctx.saved_tensors
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        layout, cls_only = ctx.layout, ctx.cls_only
        grad = grad.contiguous()
        grads = [torch.zeros_like(states) for states in (queries, keys, values, shared_keys, shared_values)]
        grad_queries, grad_keys, grad_values, grad_shared_keys, grad_shared_values = grads

        def part(rows: slice, count: int, part_keys: Tensor, part_values: Tensor, discount: float = 0.0):  # type: ignore[no-untyped-def]
            # with the merged output and log-sum-exp the kernel gives exactly this part's share of the gradient
            return attend_backward(
                by_passage(grad[rows], count),
                by_passage(queries[rows], count),
                part_keys,
                part_values,
                by_passage(output[rows], count),
                (lse[rows] + discount).unflatten(0, (count, -1)).transpose(1, 2),
                0.0,
                False,
                scale=ctx.scale,
            )

        for runs, rows, shared in list_slices(layout, cls_only):
            for run in runs:
                own = query_rows(run, cls_only)
                dq, dk, dv = part(own, run.size, own_states(keys, run, layout), own_states(values, run, layout))
                by_passage(grad_queries[own], run.size).copy_(dq)
                own_states(grad_keys, run, layout).copy_(dk)
                own_states(grad_values, run, layout).copy_(dv)
            if shared.stop > shared.start:
                shared_states = by_passage(shared_keys[shared], 1), by_passage(shared_values[shared], 1)
                dq, dk, dv = part(rows, 1, *shared_states, layout.discount(shared))
                by_passage(grad_queries[rows], 1).add_(dq)
                by_passage(grad_shared_keys[shared], 1).copy_(dk)
                by_passage(grad_shared_values[shared], 1).copy_(dv)
        return *grads, None, None, None


def plain_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shared: tuple[Tensor, Tensor],
    layout: SetLayout,
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
    for runs, _, rows in list_slices(layout, cls_only):
        shared_keys, shared_values = (by_passage(states[rows], 1) for states in shared)
        for run in runs:
            run_queries = by_passage(queries[query_rows(run, cls_only)], run.size)  # [passages, heads, rows, dim]
            own_keys, own_values = own_states(keys, run, layout), own_states(values, run, layout)
            to_shared = run_queries @ shared_keys.mT.expand(run.size, -1, -1, -1) * scale - layout.discount(rows)
            weights = torch.cat([run_queries @ own_keys.mT * scale, to_shared], dim=-1)
            weights = weights.to(_accurate(weights.dtype))
            if window is not None:
                hidden = _outside_window(run, runs[0].passage, weights.shape[-1], layout, window, cls_only)
                weights = weights.masked_fill(hidden, -torch.inf)
            weights = nn.functional.dropout(weights.softmax(-1).to(queries.dtype), dropout, training=dropout > 0)
            own, others = weights.split([own_keys.shape[2], shared_keys.shape[2]], dim=-1)
            output = own @ own_values + others @ shared_values
            outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _outside_window(run: Run, first: int, num_keys: int, layout: SetLayout, window: int, cls_only: bool) -> Tensor:
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
    columns = run.length - 1 + run.passage - first + torch.arange(run.size, device=layout.device)
    passages = torch.arange(run.size, device=layout.device)
    hidden[passages, 0, :, columns] = is_far[:, 0]
    return hidden


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which weights are normalised: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


AttentionInterface.register(ATTENTION, set_attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)  # the layout says what a mask would

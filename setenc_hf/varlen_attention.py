"""Set attention on GPUs: two calls of the variable-length flash kernel, one a passage and one a list, merged.

The same two parts as on the CPU (see [`~setenc_hf.attention`]), each for all passages of a chunk at once. torch offers
the kernel for half-precision states on CUDA devices of compute capability 8.0 and above.
"""

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attention import Chunk


class Segments:
    """Which queries meet which keys: the boundaries of both, side by side.

    Args:
        queries, keys: rows of each segment.
        device: of the boundaries, int32 [segments + 1] each.
    """

    def __init__(self, queries: list[int], keys: list[int], device: torch.device) -> None:
        self.query_ends, self.key_ends = (
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (queries, keys)
        )
        self.longest_query, self.longest_key = max(queries), max(keys)


def is_available(states: Tensor) -> bool:
    """Return whether the flash kernel takes these states [tokens, heads, dim]."""
    return (
        states.is_cuda
        and states.dtype in (torch.float16, torch.bfloat16)
        and states.shape[-1] <= 256
        and states.shape[-1] % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(states.device) >= (8, 0)
    )


def attend(queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [query rows, heads, dim] and the log-sum-exps [heads, query rows] in float32."""
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        segments.query_ends,
        segments.key_ends,
        segments.longest_query,
        segments.longest_key,
        0.0,
        False,
        False,
        scale=scale,
    )
    return output, lse


def attend_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, given an output and log-sum-exps that may span more keys."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad.device)
    return torch.ops.aten._flash_attention_backward(
        grad,
        queries,
        keys,
        values,
        output,
        lse,
        segments.query_ends,
        segments.key_ends,
        segments.longest_query,
        segments.longest_key,
        0.0,
        False,
        no_dropout,
        no_dropout,
        scale=scale,
    )


class VarlenAttention(torch.autograd.Function):
    """Both parts over all passages of a chunk; keeps no attention matrix for the backward pass."""

    @staticmethod
    def forward(ctx, queries, keys, values, shared_keys, shared_values, chunk, scale, cls_only):  # type: ignore[no-untyped-def]
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        ctx.own_rows, own, lists, discounts = plan(chunk, cls_only, queries.device)
        own_keys, own_values = (keys, values) if ctx.own_rows is None else (keys[ctx.own_rows], values[ctx.own_rows])
        output, lse = attend(queries, own_keys, own_values, own, scale)
        ctx.shared = slice(chunk.parts[0].shared.start, chunk.parts[-1].shared.stop)
        if lists is not None:
            of_lists = shared_keys[ctx.shared].contiguous(), shared_values[ctx.shared].contiguous()
            others, others_lse = attend(queries, *of_lists, lists, scale)
            others_lse = others_lse - discounts
            weight = torch.sigmoid(others_lse - lse).T[..., None]  # [query rows, heads, 1]
            output = torch.lerp(output.to(weight.dtype), others.to(weight.dtype), weight).to(queries.dtype)
            lse = torch.logaddexp(lse, others_lse)
        ctx.save_for_backward(queries, keys, values, shared_keys, shared_values, output, lse, discounts)
        ctx.own, ctx.lists, ctx.scale = own, lists, scale
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        queries, keys, values, shared_keys, shared_values, output, lse, discounts = ctx.saved_tensors
        grad = grad.contiguous()
        rows = ctx.own_rows
        own_keys, own_values = (keys, values) if rows is None else (keys[rows], values[rows])
        # with the merged output and log-sum-exp the kernel gives exactly one part's share of the gradient
        grad_queries, grad_keys, grad_values = attend_backward(
            grad, queries, own_keys, own_values, output, lse, ctx.own, ctx.scale
        )
        if rows is not None:
            grad_keys = torch.zeros_like(keys).index_copy(0, rows, grad_keys)
            grad_values = torch.zeros_like(values).index_copy(0, rows, grad_values)
        grad_shared_keys, grad_shared_values = torch.zeros_like(shared_keys), torch.zeros_like(shared_values)
        if ctx.lists is not None:
            of_lists = shared_keys[ctx.shared].contiguous(), shared_values[ctx.shared].contiguous()
            more, grad_shared_keys[ctx.shared], grad_shared_values[ctx.shared] = attend_backward(
                grad, queries, *of_lists, output, (lse + discounts).contiguous(), ctx.lists, ctx.scale
            )
            grad_queries = grad_queries + more
        return grad_queries, grad_keys, grad_values, grad_shared_keys, grad_shared_values, None, None, None


def plan(
    chunk: "Chunk", cls_only: bool, device: torch.device
) -> tuple[Tensor | None, Segments, Segments | None, Tensor]:
    """Return the rows of a passage's own keys (`None`: all), both parts' segments, and each query row's discount."""
    has_shared = chunk.layout.interaction != "none"
    queries = [1] * len(chunk.lengths) if cls_only else chunk.lengths
    own = Segments(queries, [length - has_shared for length in chunk.lengths], device)
    if not has_shared:
        return None, own, None, torch.zeros((), device=device)
    is_own = torch.ones(sum(chunk.lengths), dtype=torch.bool)
    is_own[torch.tensor([0, *accumulate(chunk.lengths)][:-1])] = False  # the interaction token is a passage's first
    rows = [part.query_rows(cls_only) for part in chunk.parts]
    sizes = [row.stop - row.start for row in rows]
    lists = Segments(sizes, [part.shared.stop - part.shared.start for part in chunk.parts], device)
    discounts = torch.tensor([chunk.layout.discount(part.shared) for part in chunk.parts])
    return is_own.nonzero()[:, 0].to(device), own, lists, discounts.repeat_interleave(torch.tensor(sizes)).to(device)

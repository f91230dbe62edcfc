"""The GPU's set attention, its logic: with the flash kernel replaced by one that works on a CPU, segment by segment."""

from itertools import pairwise

import pytest
import torch

from setenc_hf import varlen_attention
from setenc_hf.attention import SetLayout, SplitAttention
from setenc_hf.varlen_attention import VarlenAttention, is_available


def segments_of(segments):
    queries, keys = segments.query_ends.tolist(), segments.key_ends.tolist()
    rows, seen = ([slice(*ends) for ends in pairwise(sizes)] for sizes in (queries, keys))
    assert max(part.stop - part.start for part in rows) == segments.longest_query
    assert max(part.stop - part.start for part in seen) == segments.longest_key
    return zip(rows, seen)


def attend(queries, keys, values, segments, scale):
    output, lse = torch.empty_like(queries), queries.new_empty(queries.shape[1], len(queries))
    for rows, seen in segments_of(segments):
        weights = torch.einsum("qhd,khd->hqk", queries[rows], keys[seen]) * scale
        lse[:, rows] = weights.logsumexp(-1)
        output[rows] = torch.einsum("hqk,khd->qhd", weights.softmax(-1), values[seen])
    return output, lse


def attend_backward(grad, queries, keys, values, output, lse, segments, scale):
    grads = [torch.zeros_like(states) for states in (queries, keys, values)]
    for rows, seen in segments_of(segments):
        weights = (torch.einsum("qhd,khd->hqk", queries[rows], keys[seen]) * scale - lse[:, rows, None]).exp()
        through = torch.einsum("qhd,khd->hqk", grad[rows], values[seen])
        inner = weights * (through - (grad[rows] * output[rows]).sum(-1).T[..., None]) * scale
        grads[0][rows] = torch.einsum("hqk,khd->qhd", inner, keys[seen])
        grads[1][seen] = torch.einsum("hqk,qhd->khd", inner, queries[rows])
        grads[2][seen] = torch.einsum("hqk,qhd->khd", weights, grad[rows])
    return tuple(grads)


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("fill_to", [0, 6])
@pytest.mark.parametrize("interaction", ["int", "cls", "none"])
@pytest.mark.parametrize("max_tokens", [None, 12])
def test_it_equals_the_attention_of_the_cpu(monkeypatch, interaction, fill_to, normalize, cls_only, max_tokens):
    monkeypatch.setattr(varlen_attention, "attend", attend)
    monkeypatch.setattr(varlen_attention, "attend_backward", attend_backward)
    layout = SetLayout(
        [3, 5, 5, 7, 4, 4, 6], [4, 1, 2], interaction, fill_to, normalize, torch.device("cpu"), max_tokens
    )
    draw = torch.Generator().manual_seed(0)
    rows = 0 if interaction == "none" else sum(max(size, fill_to) for size in (4, 1, 2))
    assert len(layout.chunks) == (1 if max_tokens is None else 4)
    for chunk in layout.chunks:
        tokens = sum(chunk.lengths)
        sizes = [len(chunk.lengths) if cls_only else tokens, tokens, tokens, rows, rows]
        found = []
        states = [torch.randn(size, 2, 8, generator=draw, dtype=torch.float64) for size in sizes]
        direction = torch.randn(sizes[0], 2, 8, generator=draw, dtype=torch.float64)
        for function in (SplitAttention, VarlenAttention):
            inputs = [part.clone().requires_grad_() for part in states]
            output = function.apply(*inputs, chunk, 0.3, cls_only)
            output.backward(direction)
            found.append([output, *(part.grad for part in inputs)])
        for ours, theirs in zip(*found):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_kernel_is_not_for_cpus():
    assert not is_available(torch.zeros(1, 1, 8, dtype=torch.bfloat16))

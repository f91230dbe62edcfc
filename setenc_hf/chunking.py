"""Layers that work through a packed batch chunk by chunk, exactly: no window, no approximation.

Set attention needs the interaction tokens of *all* passages of a list. Their keys and values are a hundredth of a
layer's work, so a layer first makes those, and then computes chunk after chunk of passages against them. That bounds
the memory a layer needs beside its input and output, and keeps its intermediate states in the processor's cache. With
gradient checkpointing each chunk is recomputed on its own, so that a list too long for the device can be trained on.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Chunk, InteractionTokens, SetLayout
from .cpu_linear import OneDnnLinear, is_faster, widening


class ChunkedLayer:
    """What is put in front of a backbone's layer class: its `forward` runs once a chunk instead of once."""

    gradient_checkpointing: bool
    training: bool
    _gradient_checkpointing_func: Any
    is_last = False  # only `[CLS]` is needed of the last layer's output
    is_cut = False  # and its feed-forward part is computed for `[CLS]` alone

    def forward(self, hidden_states: Tensor, *args: Any, set_layout: SetLayout | None = None, **kwargs: Any) -> Tensor:
        """Return the layer's output [1, tokens, hidden], or [1, passages, hidden] where it computes `[CLS]` alone."""
        if set_layout is None:
            raise RuntimeError(
                "a layer was called without a layout: call the model through SetEncoderForReranking, not its encoder"
            )
        shared: tuple[Tensor, ...] = ()
        tokens = hidden_states.shape[1]
        if len(set_layout.chunks) > 1 and set_layout.interaction != "none":
            interaction = InteractionTokens(set_layout)
            rows = set_layout.first_rows
            self._run(hidden_states[:, rows], args, kwargs, interaction, rows, tokens)
            shared = interaction.shared or ()
        # one split, not a slice a chunk: the gradient of a slice is as long as the whole batch
        parts = hidden_states.split([chunk.tokens.stop - chunk.tokens.start for chunk in set_layout.chunks], dim=1)
        outputs = [
            self._run(part, args, kwargs, chunk, chunk.tokens, tokens, *shared)
            for part, chunk in zip(parts, set_layout.chunks, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _run(
        self,
        states: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
        chunk: Chunk | InteractionTokens,
        rows: slice | Tensor,
        tokens: int,
        *shared: Tensor,
    ) -> Tensor:
        """Run the backbone's own layer on `states`, which are some rows of the packed batch of so many tokens."""
        args, kwargs = take_rows(args, rows, tokens), take_rows(kwargs, rows, tokens)

        def run(states: Tensor, *shared: Tensor) -> Tensor:
            # a recomputed chunk must find its own layout, and its shared states must be arguments to get a gradient
            own = chunk.with_shared(*shared) if isinstance(chunk, Chunk) and shared else chunk
            own.is_used, own.cls_only = False, self.is_last
            # kept by thread, not by layer: several threads may score with one model at once
            _under_way.chunk = own
            try:
                with linear_layers(self, states):  # type: ignore[arg-type]
                    output = super(ChunkedLayer, self).forward(states, *args, set_layout=own, **kwargs)  # type: ignore[misc]
            finally:
                _under_way.chunk = None
            if not own.is_used:
                raise RuntimeError(
                    f"{type(self).__name__} did not call the set attention: it was replaced, and the scores would not "
                    "be a Set-Encoder's"
                )
            is_whole = self.is_last and output.shape[1] == states.shape[1]
            return output[:, own.cls_rows] if is_whole else output

        if self.gradient_checkpointing and self.training and isinstance(chunk, Chunk):
            return self._gradient_checkpointing_func(run, states, *shared)
        return run(states, *shared)


def linear_layers(layer: nn.Module, states: Tensor) -> AbstractContextManager:
    """Return the context in which a layer's products are computed by the faster library, where there is a choice."""
    is_choice = states.device.type == "cpu" and not torch.is_grad_enabled() and is_faster()
    return OneDnnLinear(widening(layer)) if is_choice else nullcontext()


def take_rows(value: Any, rows: slice | Tensor, tokens: int) -> Any:
    """Return `value` with the chosen rows of every tensor in it that has one row a token, [1, tokens, ...]."""
    if isinstance(value, Tensor):
        return value[:, rows] if value.dim() > 1 and value.shape[1] == tokens else value
    if isinstance(value, dict):
        return {name: take_rows(part, rows, tokens) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(part, rows, tokens) for part in value)
    return value


def chunk_layers(encoder: PreTrainedModel) -> list[nn.Module]:
    """Make every layer of a backbone work by chunks; return the layers. Names of weights and classes stay.

    Raises `ValueError`, by name, for a backbone whose layers cannot be found.
    """
    layers: list[nn.Module] = [part for part in encoder.modules() if isinstance(part, GradientCheckpointingLayer)]
    if len(layers) != encoder.config.num_hidden_layers:
        raise ValueError(
            f"{type(encoder).__name__} has {encoder.config.num_hidden_layers} layers of which {len(layers)} can be "
            "computed by chunks; a Set-Encoder needs all"
        )
    for layer in layers:
        if not isinstance(layer, ChunkedLayer):
            layer.__class__ = chunked_class(type(layer))
    return layers


def chunked_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a backbone's layer with `ChunkedLayer` in front of it, under the same name."""
    if layer_class not in _classes:
        made: Any = type(layer_class.__name__, (ChunkedLayer, layer_class), {"__module__": layer_class.__module__})
        made.forward = ChunkedLayer.forward  # without transformers' wrapper, which would checkpoint the whole layer
        _classes[layer_class] = made
    return _classes[layer_class]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def cut_last_layer(layer: Any) -> None:
    """Let the last layer give the rows of `[CLS]` alone, and compute its feed-forward part for them alone.

    Only the last `[CLS]` is scored, so behind the last attention all other rows are waste: three quarters of a
    layer's multiplications. In BERT-like layers the attention's output module is the one place that sees both the
    attention's output and its residual; layers without such a module compute the feed-forward part of every row.
    """
    layer.is_last = True
    attention: Any = getattr(layer, "attention", None)
    if hasattr(attention, "self") and hasattr(attention, "output"):
        attention.output.register_forward_pre_hook(_keep_cls)
        layer.is_cut = True


def _keep_cls(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(states[:, _under_way.chunk.cls_rows] for states in args)


_under_way = threading.local()  # `chunk`: the one that a layer of this thread computes

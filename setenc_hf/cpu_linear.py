"""Linear layers on CPUs by oneDNN where torch would take MKL, which is slower on AMD's processors.

Measured with torch 2.13 on two cores of an AMD EPYC (AVX-512, AVX512-BF16), 2,048 rows, the linear layers of a MiniLM:
float32 211 to 218 GFLOP/s against 188 to 198; bfloat16, where torch takes oneDNN by another way, 429 to 436 against
397 to 426. The layer that widens to 1,536 with GELU behind it: 12.1 ms in one call, 12.4 ms in two, 13.9 ms by torch's
own way (float32).
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.activations import GELUActivation

MIN_ROWS = 64  # below, a call costs more than the product


class OneDnnLinear(TorchFunctionMode):
    """Within this context `torch.nn.functional.linear` on the CPU is oneDNN's; not for autograd.

    Args:
        widening: a linear layer whose output goes through GELU and nowhere else: both are computed in one call.
    """

    def __init__(self, widening: nn.Linear | None = None) -> None:
        super().__init__()
        self.widened = None if widening is None else widening.weight
        self.activated: Tensor | None = None  # what has been through GELU before it was asked for

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.linear and not kwargs and _takes(*args):
            states, weight, bias = args if len(args) == 3 else (*args, None)
            if weight is not self.widened:
                return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
            self.activated = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "gelu", [], "none")
            return self.activated
        if func is nn.functional.gelu and args and args[0] is self.activated and self.activated is not None:
            activated, self.activated = self.activated, None
            return activated
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        if kind is None and self.activated is not None:
            raise RuntimeError("the output of a linear layer did not go through GELU, which was computed with it")


def widening(layer: nn.Module) -> nn.Linear | None:
    """Return the linear layer of a BERT-like layer that widens its states, where it is as built and GELU follows it."""
    intermediate: Any = getattr(layer, "intermediate", None)
    dense = getattr(intermediate, "dense", None)
    activation: Any = getattr(intermediate, "intermediate_act_fn", None)
    if type(dense) is not nn.Linear or type(activation) is not GELUActivation:
        return None  # an adapter's layer adds its own to the output
    if activation.act is not nn.functional.gelu or dense._forward_hooks:
        return None
    return dense


def _takes(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        states.dtype == weight.dtype
        and (states.dtype == torch.float32 or (states.dtype == torch.bfloat16 and has_bfloat16()))
        and states.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and weight.is_contiguous()
        and states.numel() >= MIN_ROWS * states.shape[-1]
    )


@cache
def has_bfloat16() -> bool:
    """Return whether oneDNN computes in bfloat16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_bfloat16_fast(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16; without them it is emulated.

    On one processor without them a linear layer took 1.8 times as long as in float32; on another, without AVX-512, a
    product of 2,048 x 384 x 1,536 took 120 times as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False  # not known: float32 is never a mistake
    # not public yet
    return any(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("amx_tile", "avx512_bf16"))


@cache
def is_faster() -> bool:
    """Return whether oneDNN is the better library here: where torch has it, and the processor is AMD's."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if not torch.backends.mkl.is_available():
        return False  # torch has been built for another library, which was not compared
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text("utf-8")

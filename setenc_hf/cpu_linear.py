"""Linear layers on CPUs by oneDNN where torch would take MKL, which is slower on processors that are not Intel's.

Measured with torch 2.13 on two cores of an AMD EPYC (AVX-512), 2,048 rows, float32: 199 to 206 GFLOP/s against 161 to
175 for the linear layers of a MiniLM.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MIN_ROWS = 64  # below, a call costs more than the product


class OneDnnLinear(TorchFunctionMode):
    """Within this context `torch.nn.functional.linear` of float32 on the CPU is oneDNN's; not for autograd."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.linear and not kwargs and _takes(*args):
            states, weight, bias = args if len(args) == 3 else (*args, None)
            return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _takes(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        states.dtype == weight.dtype == torch.float32
        and states.device.type == "cpu"
        and weight.is_contiguous()
        and states.numel() >= MIN_ROWS * states.shape[-1]
    )


@cache
def is_faster() -> bool:
    """Return whether oneDNN is the better library here: where torch has it, and the processor is not Intel's."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if not torch.backends.mkl.is_available():
        return False  # torch has been built for another library, which was not compared
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text("utf-8")

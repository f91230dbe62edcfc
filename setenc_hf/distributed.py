"""Several processes: what DeepSpeed needs before a model is built, and an end that cuts nobody short."""

import logging
import os
import socket

import torch.distributed
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from .chunking import ChunkedLayer
from .errors import InputError

logger = logging.getLogger(__name__)
# what a launcher or MPI tells each process; where one is set, somebody else says who we are
LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def stand_alone() -> None:
    """Tell a process started without a launcher that it is the only one, as DeepSpeed asks for MPI otherwise."""
    if any(name in os.environ for name in LAUNCHED):
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def check_launch(training: TrainingArguments) -> None:
    """Refuse to go on as something else than was asked for: several processes each alone, or FSDP that is DDP.

    One process takes one GPU, and says so where there are more: torch's DataParallel would cut lists apart.
    """
    if training.n_gpu > 1:
        logger.warning(f"{training.n_gpu} GPUs are here and one is used; accelerate launch --multi_gpu uses all")
        training._n_gpu = 1
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if training.world_size != launched:
        raise InputError(
            f"the launcher started {launched} processes but {training.world_size} take part; on CPUs pass "
            "--use_cpu true"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and training.device.type == "cpu":
        raise InputError(
            "FSDP needs GPUs: on CPUs accelerate would train with DDP and not say so; use recipes/accelerate/cpu.yaml, "
            "with --deepspeed recipes/deepspeed/zero3.json to split the weights"
        )


def start_deepspeed(training: TrainingArguments) -> None:
    """Let DeepSpeed join the process group, where it is used at all.

    ZeRO-3 splits weights as the model is built, and by then must know how many processes there are.
    """
    if training.deepspeed_plugin is None:
        return
    import deepspeed

    on_cpu = training.device.type == "cpu"
    if on_cpu:
        # else its extension for shared memory is compiled at the first start, for about a minute: gloo does as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else None, verbose=False)


def whole_layers(model: PreTrainedModel) -> None:
    """Have ZeRO-3 gather a layer's weights once for all its chunks, where it is used.

    Processes work through different numbers of chunks; gathered at every linear layer, their calls would not meet.
    """
    if is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list({type(part) for part in model.modules() if isinstance(part, ChunkedLayer)}))
        if not any(weight.requires_grad for weight in model.get_input_embeddings().parameters()):
            # else the first layer's gradients are collected before they are there: its input asks for none
            model.enable_input_require_grads()


def num_numbers(weight: nn.Parameter) -> int:
    """Return how many numbers a weight has, also where ZeRO-3 has split it and left nothing in its place."""
    return getattr(weight, "ds_numel", weight.numel())


def wait_for_all() -> None:
    """Wait until every process is here, so that none ends while another still saves."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """Wait for all, and leave the process group: a process that just exits can abort the launcher's others."""
    wait_for_all()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

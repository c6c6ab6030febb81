"""Megatron-Core on CPU ranks: the few places where it takes CUDA for granted. Where CUDA trains, nothing is changed.

    megatron_shim.install(ctx.device)        # before anything is imported from megatron

Megatron-Core's models, schedules, optimizers and checkpoints are plain torch once its fused kernels are left out. What
keeps them off a CPU is that some functions say "cuda" instead of asking where they are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from common.script import UserError

VERSION = "0.16.1"
# Functions that name the device in so many words, by module. What they do is the same on any device.
NAME_CUDA = {
    "pipeline_parallel.schedules": (  # the count of tokens: torch.zeros(device="cuda")
        "forward_backward_no_pipelining", "forward_backward_pipelining_without_interleaving",
    ),
    "optimizer": ("get_megatron_optimizer",),  # refuses parameters whose type() is not torch.cuda.FloatTensor
    "optimizer.clip_grads": ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32"),  # sums and the same check
    "optimizer.optimizer": ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32"),  # the names it imported them by
    "optimizer.distrib_optimizer:DistributedOptimizer": ("sharded_state_dict",),  # shards on their way to one rank
    "models.common.language_module.language_module:LanguageModule": (
        "setup_embeddings_and_output_layer",  # moves a tied weight to CUDA before stages agree on it
    ),
}  # fmt: skip
_installed: set[str] = set()


class CudaIsTheCpu(TorchFunctionMode):
    """Within it "cuda" means the CPU, and tensors call themselves CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = kwargs | {"device": torch.device("cpu")}
        return func(*args, **kwargs)


def _within(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with CudaIsTheCpu():
            return function(*args, **kwargs)

    return called


def install(device: torch.device) -> None:
    """Import Megatron-Core quietly, and, for CPU ranks, make it run on them. A second call does nothing.

    Raises:
        UserError: it is not installed, or this process already uses it on the other kind of device.
    """
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise UserError(f"megatron-core is not installed; run make setup, or pip install megatron-core=={VERSION}")
    if device.type in _installed:
        return
    if _installed:
        raise UserError(f"this process already runs Megatron-Core on {next(iter(_installed))}; start another one")
    _installed.add(device.type)
    with warnings.catch_warnings():
        # Apex and Transformer Engine are fused kernels for GPUs; without them it takes torch's own operations.
        warnings.filterwarnings("ignore", ".*(Transformer Engine|Apex|apex).*")
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    for quiet in ("megatron.core", "torch.distributed.checkpoint"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    # It calls collectives by the names that they had before torch 2.13, once a message.
    warnings.filterwarnings("ignore", r"`(torch\.distributed\.\w+|load_state_dict)` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
    warnings.filterwarnings("ignore", "full scope is deprecated", UserWarning)  # of its own default
    if device.type == "cpu":
        warnings.filterwarnings("ignore", ".*CUDA_DEVICE_MAX_CONNECTIONS", UserWarning)  # the queues of a GPU
        _patch()


def _patch() -> None:
    # Where weights, buffers and what is received are allocated: device=torch.cuda.current_device(), everywhere.
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Between two stages it waits for the GPU: a CPU has nothing to wait for.
    torch.cuda.synchronize = lambda *_: None
    # Streams of random numbers for dropout, kept on the GPU: a CPU rank has one stream, its own.
    tracker = importlib.import_module("megatron.core.tensor_parallel.random").CudaRNGStatesTracker
    tracker.add = lambda *_, **__: None
    tracker.fork = lambda *_, **__: contextlib.nullcontext()
    for place, names in NAME_CUDA.items():
        module, _, cls = place.partition(":")
        owner = importlib.import_module(f"megatron.core.{module}")
        owner = getattr(owner, cls) if cls else owner
        for name in names:
            setattr(owner, name, _within(getattr(owner, name)))

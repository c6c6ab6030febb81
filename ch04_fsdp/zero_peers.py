"""The training step of step.py by DeepSpeed: ZeRO stages 1, 2 and 3 behind the same two calls.

    engine = zero_peers.initialize(model, training.make_optimizer(model, lr), zero_peers.config(3, ...), ctx)
    loss = zero_peers.backward(engine, batch.micro_batches, batch.tokens, ctx.world_size)
    norm = zero_peers.update(engine)

What a rank holds by stage ("ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054):

    stage   parameters   gradients   optimizer state
      1       whole        whole        1/N
      2       whole        1/N          1/N
      3       1/N          1/N          1/N            plus the layers that compute just now

In bf16 DeepSpeed casts the model itself, and each rank's share of the optimizer keeps a float32 copy of its weights;
FSDP holds float32 shards and casts what it gathers. The arithmetic is the same, bytes held and gathered too. Gradients
differ: in bf16 DeepSpeed keeps a rank's gradients in bf16 until they are summed, FSDP casts them to float32 first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ch03_ddp.feed import Batch
from common import data
from common.dist import Context, Launch
from common.script import UserError, atomic_write

STAGES = (1, 2, 3)
Held = dict[str, list[torch.Tensor]]


def library(device: torch.device) -> ModuleType:
    """DeepSpeed, made to keep quiet and to build nothing. It is imported here alone: that takes a second or two.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed; run make setup, or pip install deepspeed==0.19.8")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it takes the GPU that it finds; read once, when it is imported
    key = _extensions_key(device)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(data.cache_dir() / "torch_extensions" / key))
    with contextlib.redirect_stdout(sys.stderr):  # its log handler keeps the stream of this moment; ours ends in RESULT
        import deepspeed
    # At its start it would compile an all-reduce through shared memory for inference on CPUs. Training does not use it.
    deepspeed.ops.__compatible_ops__ = {}
    _keep_compiled(key)
    # It calls collectives by the names that they had before torch 2.13, once a message.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _extensions_key(device: torch.device) -> str:
    """Of what DeepSpeed's compiled operators depend on: Python, torch, DeepSpeed, C library and the very processor."""
    versions = [platform.python_version(), torch.__version__, torch.version.git_version, metadata.version("deepspeed")]
    versions += [device.type, *platform.libc_ver()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        versions += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:12]


def _keep_compiled(key: str) -> None:
    """Let DeepSpeed take an operator as it is that stands compiled for `key` in TORCH_EXTENSIONS_DIR.

    Its own loader asks ninja, which compiles anew in each environment: the environment's place stands in the commands.
    """
    from deepspeed.ops.op_builder import builder

    if hasattr(builder.OpBuilder.jit_load, "__wrapped__"):  # done already
        return
    compile_it = builder.OpBuilder.jit_load

    @functools.wraps(compile_it)
    def load(self: Any, verbose: bool = True) -> ModuleType:
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / self.name
        library, mark = folder / f"{self.name}.so", folder / "complete"
        if not (mark.exists() and mark.read_text() == key and library.exists()):
            made: ModuleType = compile_it(self, verbose)
            with atomic_write(mark) as file:
                file.write(key)
            return made
        spec = importlib.util.spec_from_file_location(self.name, library)
        assert spec
        assert spec.loader
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        builder.OpBuilder._loaded_ops[self.name] = found
        return found

    builder.OpBuilder.jit_load = load


def config(
    stage: int,
    *,
    micro_batch: int,
    micro_batches: int = 1,
    max_norm: float = 1.0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 1024,
    keep: bool = False,
) -> dict[str, Any]:
    """What ds_config.json would say; DeepSpeed's default in brackets, where it is another one.

    Args:
        micro_batch: sequences a rank and micro-batch.
        micro_batches: of a step.
        hidden: the model's width, on which the sizes of messages depend.
        keep: stage 3 keeps what it gathered in forward for backward, as it does by default below 1e9 parameters.

    Raises:
        UserError: there is no such stage, or the type is neither float32 nor bfloat16.
    """
    if stage not in STAGES:
        raise UserError(f"no ZeRO stage {stage}; one of {', '.join(map(str, STAGES))}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"the ZeRO stages are compared in float32 or bfloat16, not in {dtype}; take one of those")
    layer = 12 * hidden * hidden  # about the elements of a Llama layer: what FSDP moves in a message
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,  # only counted: the batches are ours
        "gradient_accumulation_steps": micro_batches,  # engine.step() does nothing before so many backward passes
        "gradient_clipping": max_norm,  # [1.0] of the norm over all ranks; 0: none
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": layer,  # [5e8: 2 GB] elements summed in one message
        },
    }
    if stage == 3:
        made["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 10 * hidden,  # [1e5] smaller parameters are kept whole: norms
        }
        if not keep:
            made["zero_optimization"] |= {
                "stage3_max_reuse_distance": 0,  # [1e9] elements until its next use, for which a weight is not freed
                "stage3_prefetch_bucket_size": layer,  # [5e7] elements gathered ahead of their use
            }
    if dtype == torch.bfloat16:
        made |= {
            "bf16": {"enabled": True},  # model and gradients bfloat16; float32 copy of the weights in the optimizer
            "communication_data_type": "fp32",  # [bf16] of the sums over ranks, as in ch04_fsdp/sharding.py
        }
    return made


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], ctx: Context) -> Any:
    """A DeepSpeedEngine around the model, which is whole on each rank until here, and the optimizer.

    A model that is too large for that is built inside deepspeed.zero.Init (chapter 5). DeepSpeed keeps the process
    groups that it finds first for as long as the process lives: one dist.session a process.
    """
    engine, *_ = join(ctx.launch, ctx.device).initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def join(launch: Launch, device: torch.device) -> ModuleType:
    """The library, told of the ranks and with torch's process group as its own."""
    local = device.index if device.type == "cuda" else launch.local_rank  # srun may show each rank a GPU 0 of its own
    os.environ |= {  # it asks for torchrun's variables, which srun and python do not set
        "RANK": str(launch.rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(launch.world_size),
        "MASTER_ADDR": launch.address, "MASTER_PORT": str(launch.port),
    }  # fmt: skip
    deepspeed = library(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def backward(engine: Any, micro_batches: Sequence[Batch], tokens: int, world_size: int) -> torch.Tensor:
    """Gradients of the mean loss over all tokens of all micro-batches of all ranks, as step.backward.

    Returns:
        This rank's part of that mean, 0-d: the parts of all ranks add up to it.

    Raises:
        UserError: the engine was made for another number of micro-batches.
    """
    if len(micro_batches) != (wanted := engine.gradient_accumulation_steps()):
        raise UserError(
            f"a step of {len(micro_batches)} micro-batches in an engine whose config says {wanted}; give it as many"
        )
    parts = []
    for number, (inputs, targets) in enumerate(micro_batches, 1):
        # The sum over the tokens of these rows, over all tokens of the step. It is taken inside the model: DeepSpeed
        # looks after each tensor that leaves the engine, and logits are large.
        labels = targets.contiguous()
        loss = engine(
            input_ids=inputs, labels=labels, shift_labels=labels, num_items_in_batch=tokens, use_cache=False
        ).loss
        # DeepSpeed divides by the ranks, and would by the micro-batches too: a mean of means, wrong for ragged rows.
        engine.backward(loss * world_size, scale_wrt_gas=False)
        if number < wanted:
            engine.step()  # counts; the last one, in `update`, is the step
        parts.append(loss.detach())
    return torch.stack(parts).sum()


def update(engine: Any) -> torch.Tensor:
    """Clip, step, forget the gradients. Returns their norm before, 0-d, the whole model's on every rank.

    In stage 0 and float32 DeepSpeed keeps it to itself; there each rank holds all gradients.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        norm = nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        engine.step()
        return norm
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm())


def gradients(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole gradient of each parameter, after `backward`. A collective, one parameter at a time."""
    from deepspeed.utils import safe_get_full_grad

    for name, parameter in engine.module.named_parameters():
        yield name, safe_get_full_grad(parameter)


def weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole float32 value of each parameter: what the optimizer steps on. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        yield name, safe_get_full_fp32_param(parameter)


def states(engine: Any) -> Held:
    """The tensors that this rank holds between `backward` and `update`, by kind; several may share a storage.

    master: the optimizer's own copy of its share of the weights, which stages 1 and 2 have in float32 too.
    """
    zero = engine.optimizer
    parameters = list(engine.module.parameters())
    shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]  # stage 3
    summed = [x for group in zero.averaged_gradients.values() for x in _flat(group)]
    return {
        "parameters": [p.data for p in parameters] + shards,
        "gradients": [p.grad for p in parameters if p.grad is not None] + summed,
        "optimizer": [x for held in zero.optimizer.state.values() for x in held.values() if torch.is_tensor(x)],
        "master": [p.data for group in zero.optimizer.param_groups for p in group["params"]]
        + list(getattr(zero, "fp32_partitioned_groups_flat", [])),
    }


def _flat(group: Any) -> list[torch.Tensor]:
    if group is None:
        return []
    return [group] if torch.is_tensor(group) else [x for x in group if x is not None]


def save(engine: Any, folder: Path) -> None:
    """Weights and optimizer, each rank its share of them. A collective."""
    engine.save_checkpoint(str(folder), tag="step")

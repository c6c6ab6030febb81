"""DDP, FSDP and ZeRO behind one face, so that each can be proven equal, counted, weighed, timed and saved alike."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from ch01_intro import training
from ch03_ddp.feed import StepBatch
from ch04_fsdp import step, zero_peers
from ch04_fsdp.sharding import Sharding, shard
from common import lm
from common.dist import Context
from common.script import UserError

SHARDED = {  # kinds of state of which a rank holds 1/N between backward and update
    "ddp": (),
    "fsdp-grad": ("parameters", "gradients", "optimizer"),  # parameters are whole from forward to backward
    "fsdp-full": ("parameters", "gradients", "optimizer"),
    "zero-1": ("gradients", "optimizer"),  # gradients are whole until the last micro-batch is summed
    "zero-2": ("gradients", "optimizer"),
    "zero-3": ("parameters", "gradients", "optimizer"),
    "zero-3-keep": ("parameters", "gradients", "optimizer"),  # parameters are whole from forward to backward
}
NAMES = tuple(SHARDED)
BYTES_AN_ELEMENT = {"parameters": 4, "gradients": 4, "optimizer": 8}  # float32; Adam has two moments
ZERO_BF16 = {"parameters": 2, "gradients": 2, "optimizer": 8, "master": 4}  # DeepSpeed casts the model


@dataclass(frozen=True)
class Job:
    """What all train. config: of a transformers decoder."""

    config: Any
    ctx: Context
    micro_batch: int
    micro_batches: int = 1
    lr: float = 1e-3
    max_norm: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0
    seq_len: int = 128

    def model(self) -> nn.Module:
        model = lm.build(self.config, self.ctx.device, seed=self.seed)
        return model.train()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return training.make_optimizer(model, self.lr)


class Torch:
    """DDP and FSDP, by the functions of train_fsdp.py."""

    def __init__(self, job: Job, strategy: str) -> None:
        self.job, self.sharding = job, Sharding(strategy, dtype=job.dtype)
        mesh = self.sharding.mesh(job.ctx.world_size, job.ctx.device)
        self.model = shard(job.model(), self.sharding, mesh)
        self.optimizer = job.optimizer(self.model)

    def backward(self, batch: StepBatch) -> torch.Tensor:
        return step.backward(
            self.model, batch.micro_batches, batch.tokens, self.job.ctx.world_size, self.sharding, sync_each=True
        )  # as ZeRO does: gradients are held as shards also between micro-batches

    def update(self) -> torch.Tensor:
        return step.update(self.model, self.optimizer, self.job.max_norm)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name.removeprefix("module."), p) for name, p in self.model.named_parameters())

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, _whole(p.grad)) for name, p in self._named() if p.grad is not None)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, _whole(p.detach())) for name, p in self._named())

    def states(self) -> zero_peers.Held:
        parameters = [p.detach() for p in self.model.parameters()]
        return {
            "parameters": parameters,
            "gradients": [p.grad for p in self.model.parameters() if p.grad is not None],
            "optimizer": [x for held in self.optimizer.state.values() for x in held.values()],
        }

    def save(self, folder: Path) -> None:
        """DDP: rank 0 writes one file, as all ranks hold the same. FSDP: each rank writes its shards."""
        state = dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True))
        if self.sharding.strategy != "replicate":
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=False))
        elif self.job.ctx.is_main:
            torch.save(state, folder / "state.pt")

    def close(self) -> None:
        del self.model, self.optimizer
        gc.collect()


class Zero:
    """A stage of DeepSpeed."""

    def __init__(self, job: Job, stage: int, *, keep: bool = False) -> None:
        self.job, model = job, job.model()
        settings = zero_peers.config(
            stage, micro_batch=job.micro_batch, micro_batches=job.micro_batches, max_norm=job.max_norm, dtype=job.dtype,
            hidden=job.config.hidden_size, keep=keep,
        )  # fmt: skip
        self.engine = zero_peers.initialize(model, job.optimizer(model), settings, job.ctx)

    def backward(self, batch: StepBatch) -> torch.Tensor:
        return zero_peers.backward(self.engine, batch.micro_batches, batch.tokens, self.job.ctx.world_size)

    def update(self) -> torch.Tensor:
        return zero_peers.update(self.engine)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return zero_peers.gradients(self.engine)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return zero_peers.weights(self.engine)

    def states(self) -> zero_peers.Held:
        return zero_peers.states(self.engine)

    def save(self, folder: Path) -> None:
        zero_peers.save(self.engine, folder)

    def close(self) -> None:
        self.engine.destroy()
        del self.engine
        gc.collect()


Contestant = Torch | Zero
MORE: dict[str, Any] = {}  # those that a later chapter brings along: classes with what the functions below ask for


def build(name: str, job: Job) -> Contestant:
    """
    Raises:
        UserError: no contestant of that name.
    """
    check([name])
    if name in MORE:
        return MORE[name](job)
    if name.startswith("zero-"):
        return Zero(job, int(name[5]), keep=name.endswith("-keep"))
    return Torch(job, "replicate" if name == "ddp" else name.removeprefix("fsdp-"))


def check(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in (*NAMES, *MORE)]:
        raise UserError(f"no contestant {unknown[0]!r}; of {', '.join((*NAMES, *MORE))}")


def train(contestant: Contestant, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """One step. Returns this rank's part of the mean loss, and the norm of the gradients."""
    return contestant.backward(batch), contestant.update()


def held_bytes(contestant: Contestant) -> dict[str, int]:
    """Bytes by kind of state, a storage counted once, for the first kind that has it. Scalars (step counts) are not."""
    seen: set[int] = set()
    held = {}
    for kind, tensors in contestant.states().items():
        held[kind] = 0
        for tensor in tensors:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            if tensor.dim() and storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held[kind] += storage.nbytes()
    return held


def ideal_bytes(name: str, parameters: int, ranks: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """What the strategy promises a rank to hold, by kind. dtype: of the matrix products."""
    if name in MORE:
        return MORE[name].ideal_bytes(parameters, ranks, dtype)
    sizes = ZERO_BF16 if name.startswith("zero") and dtype == torch.bfloat16 else BYTES_AN_ELEMENT
    shared_out = (*SHARDED[name], "master")
    return {kind: parameters * size / (ranks if kind in shared_out else 1) for kind, size in sizes.items()}


def gathered_again(config: Any) -> int:
    """Parameters that FSDP in full gathers in backward as well: those of the layers (see sharding.shard)."""
    ends = config.hidden_size * (1 + config.vocab_size * (1 if config.tie_word_embeddings else 2))
    return lm.parameter_count(config) - ends


def sent_bytes(name: str, *, summed: int, gathered: int, ranks: int, again: int = 0, micro_batches: int = 1) -> float:
    """Bytes that a rank sends in a step by each strategy, whatever else travels (the norm, flags) left out.

    Args:
        summed: bytes of all gradients as they travel.
        gathered: bytes of all parameters as they travel.
        again: of those that FSDP gathers twice.
    """
    part = (ranks - 1) / ranks
    reduce, gather = part * summed, part * gathered
    return {
        "ddp": 2 * reduce,
        "fsdp-grad": micro_batches * (gather + reduce),
        "fsdp-full": micro_batches * (gather + part * again + reduce),
        "zero-1": 2 * reduce + gather,  # a reduce-scatter would do, DeepSpeed sums whole buckets
        "zero-2": micro_batches * 2 * reduce + gather,
        "zero-3": micro_batches * (2 * gather + reduce),
        "zero-3-keep": micro_batches * (gather + reduce),
    }[name]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

"""Megatron-Core behind the face of chapter 4's contestants: a distributed optimizer, or tensor parallelism."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ch03_ddp.feed import StepBatch
from ch04_fsdp.contestants import Job
from ch05_deepspeed_megatron import megatron_checkpoints, megatron_mapping, megatron_model, megatron_shim, megatron_step
from ch05_deepspeed_megatron.megatron_layout import Layout


class Megatron:
    """Data parallel with the optimizer's state shared out, as ZeRO-1."""

    tensor_parallel = False
    shared_out: tuple[str, ...] = ("optimizer", "master")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.layout = Layout(tp=job.ctx.world_size if self.tensor_parallel else 1)
        self.layout.check(job.config, job.ctx.world_size)
        megatron_shim.install(job.ctx.device)
        self.place: dict[str, Any] = _places()  # empty: nobody's
        self.open = ExitStack()
        with self:
            self.open.enter_context(self.layout.groups(job.ctx))
            self.model = megatron_model.build(job.config, self.layout, job.ctx, dtype=job.dtype)
            given = dict(job.model().named_parameters())
            megatron_mapping.fill(
                self.model,
                job.ctx,
                lambda name, dim, part, parts: given[name] if dim is None else given[name].chunk(parts, dim)[part],
            )
            self.ddp, self.optimizer = megatron_model.wrap(
                self.model, job.ctx, lr=job.lr, clip=job.max_norm, distributed_optimizer=not self.tensor_parallel
            )

    def __enter__(self) -> None:
        """Megatron keeps its groups in variables of a module: one model a process. Here they change with the turn."""
        self.others = _places()
        _set_places(self.place)

    def __exit__(self, *_: object) -> None:
        self.place = _places()
        _set_places(self.others)

    def backward(self, batch: StepBatch) -> torch.Tensor:
        with self:
            micro_batches = list(batch.micro_batches)
            if self.tensor_parallel:  # all ranks work on each row: those of the others too
                micro_batches = [rows for mine in micro_batches for rows in _of_all_ranks(*mine)]
            return megatron_step.backward(self.ddp, micro_batches, batch.tokens)

    def update(self) -> torch.Tensor:
        with self:
            return torch.as_tensor(float(megatron_step.update(self.optimizer)))

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self:
            if not self.tensor_parallel:
                megatron_mapping.gather_gradients(self.ddp)
            yield from megatron_mapping.whole_here(self.model, self.job.ctx, "main_grad")

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self:
            yield from megatron_mapping.whole_here(self.model, self.job.ctx, "data")

    def states(self) -> dict[str, list[torch.Tensor]]:
        parts = self.optimizer.chained_optimizers
        state = [x for part in parts for held in part.optimizer.state.values() for x in held.values()]
        stepped = [p.data for part in parts for group in part.optimizer.param_groups for p in group["params"]]
        return {
            "parameters": [p.data for p in self.ddp.parameters()],
            "gradients": [buffer.grad_data for buffer in self.ddp.buffers],
            "optimizer": [x for x in state if torch.is_tensor(x)],
            "master": stepped,  # the parameters themselves in float32, counted above
        }

    def save(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        with self:
            state = megatron_checkpoints.sharded_state(self.ddp, self.optimizer, is_loading=False)
            dist_checkpointing.save(state, str(folder))

    def close(self) -> None:
        with self:
            self.open.close()
        del self.ddp, self.optimizer, self.model
        gc.collect()

    @classmethod
    def ideal_bytes(cls, parameters: int, ranks: int, dtype: torch.dtype) -> dict[str, float]:
        """What it promises a rank to hold: gradients are float32 always."""
        sizes = {"parameters": 4, "gradients": 4, "optimizer": 8}
        if dtype == torch.bfloat16:
            sizes |= {"parameters": 2, "master": 4}
        return {kind: parameters * size / (ranks if kind in cls.shared_out else 1) for kind, size in sizes.items()}

    @classmethod
    def sent_bytes(cls, job: Job, parameters: int) -> float:
        """A rank's in a step: float32 gradients reduce-scattered once, weights gathered once."""
        part = (job.ctx.world_size - 1) / job.ctx.world_size
        return part * parameters * (4 + (4 if job.dtype == torch.float32 else 2))


class MegatronTensorParallel(Megatron):
    """Each matrix is cut over all ranks, which work on the same rows."""

    tensor_parallel = True
    shared_out = ("parameters", "gradients", "optimizer", "master")

    @classmethod
    def sent_bytes(cls, job: Job, parameters: int) -> float:
        """A rank's in a step: an all-reduce of the activations [b, t, hidden] after attention and after the MLP, in
        forward and in backward, after the embedding and before the head. What the loss needs is a number a token."""
        ranks = job.ctx.world_size
        size = job.micro_batch * job.seq_len * job.config.hidden_size * (4 if job.dtype == torch.float32 else 2)
        messages = 4 * job.config.num_hidden_layers + 2
        return 2 * (ranks - 1) / ranks * size * messages * job.micro_batches * ranks  # ranks: all ranks' rows


ENGINES = {"megatron-dp": Megatron, "megatron-tp": MegatronTensorParallel}


def _of_all_ranks(inputs: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    own = torch.stack([inputs, targets])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return [(inputs, targets) for inputs, targets in every]


def _places() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {name: value for name, value in vars(parallel_state).items() if name.isupper() or name.startswith("_M")}


def _set_places(found: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    vars(parallel_state).update(found)

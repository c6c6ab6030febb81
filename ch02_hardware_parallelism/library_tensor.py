"""Tensor and sequence parallelism by the library: a plan of layouts, from which DTensor derives the communication.

The same model, cut the same way as in tensor_parallel.py and sequence_parallel.py. A style says how a layer's weight is
placed on the ranks (Shard(dim), Replicate) and what its input and output look like; where two layouts differ, DTensor
inserts the collective, and its opposite in backward. What the plan does not say stays an ordinary tensor.

As a script: tensor_parallel.py --strategy library-tensor (or library-sequence). All of it runs on gloo. Four things to
know, seen in PyTorch 2.13 and set right below: tied weights come apart; SequenceParallel makes frozen parameters
trainable; an optimizer that steps over many tensors at once may not mix DTensors with ordinary ones; and a gradient may
stay Partial, a sum not yet taken.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from ch02_hardware_parallelism import model as models
from ch02_hardware_parallelism import sequence_parallel, tensor_parallel
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.strategy import (
    Batch,
    MakeOptimizer,
    Strategy,
    gather_in_one_message,
    token_count,
    trainable,
)

Plan = dict[str, ParallelStyle]


def tensor_plan() -> Plan:
    """Between the layers named here activations are ordinary tensors, whole on every rank."""
    column, row = ColwiseParallel, RowwiseParallel
    whole = {"input_layouts": (Replicate(),), "desired_input_layouts": (Replicate(),)}
    return {
        "embedding.token": row(input_layouts=Replicate()),  # rows of the table: words
        "blocks.*.attention": PrepareModuleInput(**whole),  # else backward has an all_reduce each for q, k and v
        **{f"blocks.*.attention.{name}": column() for name in "qkv"},
        "blocks.*.attention.out": row(),
        "blocks.*.mlp.up": column(),
        "blocks.*.mlp.down": row(),
        "head": column(use_local_output=False),  # logits [b, t, v], sharded along v, for loss_parallel
    }


def sequence_plan() -> Plan:
    """The same with activations sharded along t between the regions."""
    along_t, whole = Shard(1), Replicate()
    gathered = {"input_layouts": (along_t,), "desired_input_layouts": (whole,)}
    return {
        **tensor_plan(),
        # The positions are added before the cut: the library has no position embedding of a shard of t.
        "embedding": PrepareModuleOutput(output_layouts=(whole,), desired_output_layouts=(along_t,)),
        **{f"blocks.*.{name}": SequenceParallel(use_local_output=True) for name in ("norm1", "norm2")},
        "norm": SequenceParallel(use_local_output=True),
        "blocks.*.attention": PrepareModuleInput(**gathered),
        "blocks.*.attention.out": RowwiseParallel(output_layouts=along_t),
        "blocks.*.mlp.up": ColwiseParallel(input_layouts=along_t),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=along_t),
        "head": ColwiseParallel(input_layouts=along_t, use_local_output=False),
    }


def whole(x: torch.Tensor) -> torch.Tensor:
    """A DTensor gathered, and summed where it is Partial. An ordinary tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


class LibraryTensorParallel(Strategy):
    """parallelize_module with ColwiseParallel, RowwiseParallel and loss_parallel."""

    plan = staticmethod(tensor_plan)

    def __init__(self, model: models.Transformer, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        self.mesh = mesh_of(comm, next(model.parameters()).device)
        parallelize_module(model, self.mesh, self.plan())
        if model.shape.tied:  # each layer was given a sharded copy of its own
            model.head.weight = model.embedding.token.weight
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name not in frozen
        super().__init__(model, comm, lambda own: make_optimizer([{"params": kind} for kind in separated(own)]))

    @staticmethod
    def why_not(model: models.Transformer, ranks: int) -> str | None:
        return tensor_parallel.TensorParallel.why_not(model, ranks)

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        tokens = token_count(micro_batches)
        loss = 0.0
        for inputs_bt, targets_bt in micro_batches:
            with loss_parallel():  # cross_entropy on logits sharded along v; its backward belongs inside too
                logits_btv = self.model(inputs_bt)
                part = F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten(), reduction="sum") / tokens
                part.backward()
            loss += whole(part.detach())
        for _, parameter in trainable(self.model):
            if isinstance(parameter.grad, DTensor) and parameter.grad.placements[0].is_partial():
                parameter.grad = parameter.grad.redistribute(placements=[Replicate()])  # else each reader sums it anew
        return loss

    def gradients(self) -> dict[str, torch.Tensor]:
        return self.gather(super().gradients())

    def weights(self) -> dict[str, torch.Tensor]:
        return self.gather(super().weights())

    def gather(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """full_tensor() of each would do, with a message each."""
        kinds = {name: x.placements[0] for name, x in tensors.items() if isinstance(x, DTensor)}
        local = {name: x.to_local() if name in kinds else x for name, x in tensors.items()}
        return gather_in_one_message(local, {name: k.dim for name, k in kinds.items() if k.is_shard()}, self.comm)

    def squared_norm(self) -> torch.Tensor:
        """A DTensor knows which of its copies are copies: no rank counts one twice.

        Sums of shards stay Partial, so that all of them together take one all_reduce.
        """
        squares = [p.grad.square().sum() for _, p in trainable(self.model) if p.grad is not None]
        return sum(whole(sum(part)) for part in separated(squares))


class LibrarySequenceParallel(LibraryTensorParallel):
    """The same with SequenceParallel norms."""

    plan = staticmethod(sequence_plan)

    @staticmethod
    def why_not(model: models.Transformer, ranks: int) -> str | None:
        return sequence_parallel.SequenceParallel.why_not(model, ranks)


def mesh_of(comm: Comm, device: torch.device) -> DeviceMesh:
    if comm.group is None:
        return init_device_mesh(device.type, (comm.size,))
    return DeviceMesh.from_group(comm.group, device.type)


def separated(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """DTensors and ordinary ones: the two cannot be added or stepped over together."""
    tensors = list(tensors)
    kinds = [[x for x in tensors if isinstance(x, DTensor) is sharded] for sharded in (True, False)]
    return [kind for kind in kinds if kind]

"""How a model is spread over the ranks: what fully_shard is told for each strategy, what is recomputed or offloaded.

    sharding = Sharding("hybrid", shard_ranks=2, recompute="block")
    model = shard(lm.build(config, "meta"), sharding, sharding.mesh(world_size=4, device=ctx.device))

The strategies, by the names of FSDP1 that papers and old code use:

    full        FULL_SHARD           ZeRO-3   weights gathered layer by layer, in forward and again in backward
    grad        SHARD_GRAD_OP        ZeRO-2   gathered in forward, kept until backward has used them
    hybrid      HYBRID_SHARD         ZeRO-3   inside a group of shard_ranks, the groups holding copies of each other
    hybrid-grad _HYBRID_SHARD_ZERO2  ZeRO-2   the same
    replicate   NO_SHARD             DDP      every rank holds everything
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as td
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ch03_ddp import step as ddp_step
from ch04_fsdp import recompute as recomputing
from common.script import UserError

STRATEGIES = ("full", "grad", "hybrid", "hybrid-grad", "replicate")
FSDP1_NAMES = {
    "FULL_SHARD": "full",
    "SHARD_GRAD_OP": "grad",
    "HYBRID_SHARD": "hybrid",
    "_HYBRID_SHARD_ZERO2": "hybrid-grad",
    "NO_SHARD": "replicate",
}
OFFLOADS = ("none", "cpu", "disk")  # where shards live between their uses


# By the job's own group, and gone with it: a mesh of two dimensions makes process groups, which are dear.
_meshes: WeakKeyDictionary[td.ProcessGroup, dict[tuple[bool, int], DeviceMesh]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Sharding:
    """Everything about a training step that is not the model, its data or its optimizer."""

    strategy: str = "full"
    shard_ranks: int | None = None  # hybrid only: ranks that share one copy of the model; None: those of a node
    dtype: torch.dtype = torch.float32  # of the gathered weights and the activations; shards stay float32
    recompute: str = "none"  # see recompute.py
    offload: str = "none"
    prefetch: int = 1  # layers gathered ahead of the one that computes; 1 is what FSDP does by itself
    compile: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(f"no strategy {self.strategy!r}; one of {', '.join(STRATEGIES)}")
        if self.offload not in OFFLOADS:
            raise UserError(f"cannot offload to {self.offload!r}; one of {', '.join(OFFLOADS)}")
        if self.strategy == "replicate" and self.offload != "none":
            raise UserError("replicate has no shards to offload; take another --strategy")
        if self.shard_ranks and not self.is_hybrid:
            raise UserError("a number of ranks that share a copy belongs to a hybrid strategy; take --strategy hybrid")
        recomputing.check(self.recompute)

    @property
    def is_hybrid(self) -> bool:
        return self.strategy.startswith("hybrid")

    @property
    def reshards(self) -> bool:
        """Whether a layer's weights are freed after its forward pass, and gathered anew in backward."""
        return self.strategy in ("full", "hybrid")

    def mesh(self, world_size: int, device: torch.device, ranks_a_node: int | None = None) -> DeviceMesh:
        """One dimension, or replicate x shard for hybrid: ranks of one node are neighbours, so rows are nodes.

        Raises:
            UserError: the groups do not divide the ranks.
        """
        group = (self.shard_ranks or ranks_a_node or world_size) if self.is_hybrid else world_size
        if world_size % group:
            raise UserError(
                f"{world_size} ranks do not divide into groups of {group}; take --shard-ranks "
                + " or ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
            )
        made = _meshes.setdefault(td.group.WORLD, {})
        key = (self.is_hybrid, group)
        if key not in made:
            names = ("replicate", "shard") if self.is_hybrid else ("shard",)
            shape = (world_size // group, group) if self.is_hybrid else (world_size,)
            made[key] = init_device_mesh(device.type, shape, mesh_dim_names=names)
        return made[key]


def units(model: nn.Module) -> list[list[nn.Module]]:
    """What is gathered and freed together, in the order of forward: the embedding, each layer, the head.

    A head that is tied to the embedding stays with it in the root's unit: the two are one parameter.
    """
    decoder, head = model.model, model.lm_head
    layers: list[list[nn.Module]] = [[layer] for layer in decoder.layers]
    if head.weight is decoder.embed_tokens.weight:
        return layers
    return [[decoder.embed_tokens], *layers, [decoder.norm, head]]


def shard(model: nn.Module, sharding: Sharding, mesh: DeviceMesh) -> nn.Module:
    """The model spread over the ranks of `mesh`; the same object, but for replicate, whose result is to be called.

    It may be on the meta device (see weights.py); replicate and a compiled DDP want it whole. After this each parameter
    is a DTensor that holds this rank's rows of it.
    """
    recomputing.wrap(model, sharding.recompute)
    if sharding.compile:
        ddp_step.compile_layers(model)
    if sharding.strategy == "replicate":
        return ddp_step.wrap(model)
    policy = MixedPrecisionPolicy(
        param_dtype=None if sharding.dtype == torch.float32 else sharding.dtype,
        reduce_dtype=None if sharding.dtype == torch.float32 else torch.float32,  # a sum over ranks loses least so
    )
    pinned = sharding.offload == "cpu" and mesh.device_type == "cuda"  # what a file backs cannot be pinned
    offload = OffloadPolicy() if sharding.offload == "none" else CPUOffloadPolicy(pin_memory=pinned)
    decoder, parts = model.model, units(model)
    tied = model.lm_head.weight is decoder.embed_tokens.weight
    # Backward begins with the unit that has the head: freed after forward, it would be gathered again after the loss,
    # and nothing would compute meanwhile. Kept, it costs its size in the loss. With a tied head that is the root, which
    # fully_shard keeps by itself; torchtitan and DeepSpeed keep the head as well.
    last = model if tied else parts[-1]
    for unit in [*parts, model]:  # the root last: it takes what is left
        fully_shard(
            unit, mesh=mesh, mp_policy=policy, offload_policy=offload,
            reshard_after_forward=sharding.reshards and unit is not last,
        )  # fmt: skip
    if not tied:
        decoder.embed_tokens.set_unshard_in_backward(False)  # type: ignore[operator]  # its gradient needs no weights
    if sharding.prefetch > 1:
        prefetch(model, sharding.prefetch)
    return model


def prefetch(model: nn.Module, ahead: int) -> None:
    """Gather the weights of the next `ahead` layers while one computes: hides a slow link, takes their memory."""
    layers: list[FSDPModule] = list(model.model.layers)
    for number, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + ahead])
        layer.set_modules_to_backward_prefetch(layers[max(0, number - ahead) : number][::-1])

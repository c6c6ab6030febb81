"""The disk tier: shards, their gradients and the optimizer's state live in a file, in memory only while they are used.

    tier = Tier(shard(model, sharding, mesh), folder)      # the model's parameters are in the file from here on
    tier.hold(optimizer)                                   # and its state
    tier.clip(max_norm), tier.step(optimizer)              # one parameter, one unit after the other

The file is mapped into memory (MAP_SHARED), so that a shard is a tensor like any other: the kernel reads its pages when
they are touched and writes changed ones back by itself. They are no part of the heap: under pressure the kernel takes
them, and never has to kill anybody for them. Two hints make it a tier. MADV_WILLNEED has the next layer's pages read
while this one computes. MADV_DONTNEED takes a layer's pages off this process once they have been gathered; nothing is
lost by it, as the mapping is shared. Works on any disk and any device: on a GPU, FSDP copies from the mapping.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ch04_fsdp import offload_folder

KINDS = ("weight", "grad", "exp_avg", "exp_avg_sq")  # what is kept of a parameter; of a frozen one only the weight
STATE = KINDS[2:]  # Adam's
Spans = dict[str, tuple[int, int]]  # of one parameter: offset and bytes of each kind


class Tier:
    """The file of one rank and what lies in it: by unit, in the order of forward, so that disks read in sequence.

    Attributes:
        size: bytes of the file.
        paged_in: bytes that came into this process's memory, by our own count: of what was used, when it is let go.
        paged_out: those that left it changed. What the kernel made of it, with its page cache, /proc/self/io knows.
    """

    def __init__(self, model: nn.Module, folder: Path, *, cached: bool = True) -> None:
        """
        Args:
            model: after fully_shard, on the CPU (its values move) or on the meta device (all are 0 then).
            cached: False: what leaves this process leaves the page cache too, so that each use is a read of the disk:
                slow, and what it would be if the file were far larger than the machine's memory.

        Raises:
            UserError: the folder is missing, cannot be written to, or has too little room; or this is no Linux.
        """
        self.cached = cached
        self.paged_in = self.paged_out = 0
        # FSDP's own record of what it gathers together; there is no public way to it.
        groups = {
            id(group): group
            for module in model.modules() if isinstance(module, FSDPModule)
            for group in module._get_fsdp_state()._fsdp_param_groups
        }  # fmt: skip
        self.units: list[list[nn.Parameter]] = []
        self._sharded: dict[nn.Parameter, Any] = {}
        self._spans: dict[nn.Parameter, Spans] = {}
        self.size = 0
        laid_out = [self._lay_out(group.fsdp_params) for group in groups.values()]
        self._file, self._map = offload_folder.mapped(folder, self.size)
        for number, (group, unit) in enumerate(zip(groups.values(), laid_out, strict=True)):
            for sharded, spans in unit.items():
                self._place(sharded, spans)
            self.units.append([sharded.sharded_param for sharded in unit])
            self._follow(group.modules, number)
        model._disk_tier = self  # type: ignore[assignment]

    def _lay_out(self, unit: list[Any]) -> dict[Any, Spans]:
        """Room in the file for a unit: all its weights, then all its gradients, and so on, each from a page's start."""
        room: dict[Any, Spans] = {sharded: {} for sharded in unit}
        for kind in KINDS:
            for sharded, spans in room.items():
                if kind == "weight" or sharded.sharded_param.requires_grad:
                    used = sharded.padded_sharded_param_size.numel() * sharded.sharded_param.element_size()
                    spans[kind] = (self.size, used)
                    self.size += -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
        return room

    def _place(self, sharded: Any, spans: Spans) -> None:
        """Put one parameter's shard into the file, padded as FSDP gathers it: then it never has to be copied."""
        old = sharded.sharded_param
        flat = self._tensor(spans["weight"], old.dtype)
        if old.device.type != "meta":
            flat.copy_(sharded._sharded_param_data)
        sharded._sharded_param_data = flat
        sharded.sharded_param = nn.Parameter(self._shaped(sharded, flat), requires_grad=old.requires_grad)
        sharded._setattr_on_modules(sharded.sharded_param)
        self._spans[sharded.sharded_param], self._sharded[sharded.sharded_param] = spans, sharded
        if old.requires_grad:
            sharded.sharded_param.register_post_accumulate_grad_hook(self._take_gradient)
        self.leave([sharded.sharded_param], ["weight"], changed=True)

    def _tensor(self, span: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(self._map, dtype=dtype, offset=span[0], count=span[1] // dtype.itemsize)

    @staticmethod
    def _shaped(sharded: Any, flat: torch.Tensor) -> DTensor:
        """This rank's rows, without the padding."""
        rows = sharded.sharded_size.numel()
        return sharded.to_sharded_dtensor(flat[:rows].view(sharded.sharded_size))

    def _in_file(self, parameter: nn.Parameter, kind: str) -> DTensor:
        return self._shaped(self._sharded[parameter], self._tensor(self._spans[parameter][kind], parameter.dtype))

    # Paging.

    def ahead(self, unit: int, kinds: Iterable[str] = KINDS) -> None:
        """Have the kernel read a unit's pages while we do something else. A unit that does not exist has none."""
        for parameter in self.units[unit] if 0 <= unit < len(self.units) else ():
            for kind in kinds:
                if span := self._spans[parameter].get(kind):
                    self._map.madvise(mmap.MADV_WILLNEED, *span)

    def leave(self, parameters: Iterable[nn.Parameter], kinds: Iterable[str] = KINDS, *, changed: bool) -> None:
        """These have been used: their pages need not stay with this process."""
        for parameter in parameters:
            for kind in kinds:
                if span := self._spans[parameter].get(kind):
                    self.paged_in += span[1]
                    self.paged_out += span[1] if changed else 0
                    self._map.madvise(mmap.MADV_DONTNEED, *span)
                    if not self.cached:
                        self._uncache(*span, changed=changed)

    def _uncache(self, offset: int, size: int, *, changed: bool) -> None:
        if changed:
            self._map.flush(offset, size)  # only what is on the disk can be dropped
        os.posix_fadvise(self._file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)

    def _follow(self, modules: tuple[nn.Module, ...], unit: int) -> None:
        """Page along with the passes. FSDP's own hooks, which gather, came first and so run first."""
        parameters = self.units[unit]

        @torch.compiler.disable
        def gathered(towards: int) -> None:
            self.leave(parameters, ["weight"], changed=False)
            self.ahead(unit + towards, ["weight"])

        @torch.compiler.disable
        def before_backward(module: nn.Module, inputs: object, outputs: object) -> None:
            for tensor in pytree.tree_leaves(outputs):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: gathered(-1))

        modules[0].register_forward_pre_hook(lambda module, inputs: gathered(+1))
        modules[-1].register_forward_hook(before_backward)

    @torch.no_grad()
    def _take_gradient(self, parameter: nn.Parameter) -> None:
        """FSDP has reduced a gradient into memory, or added it to what is in the file already."""
        assert isinstance(parameter.grad, DTensor)
        place = self._in_file(parameter, "grad")
        if parameter.grad.to_local().data_ptr() != place.to_local().data_ptr():
            place.to_local().copy_(parameter.grad.to_local())
            parameter.grad = place
        self.leave([parameter], ["grad"], changed=True)

    # The optimizer.

    @torch.no_grad()
    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Let Adam's moments lie in the file: new ones are 0, loaded ones move. Others' state stays in memory."""
        if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
            return
        for parameter in (p for unit in self.units for p in unit if p.requires_grad):
            state = optimizer.state[parameter]
            state.setdefault("step", torch.zeros(()))
            for kind in STATE:
                place = self._in_file(parameter, kind)
                if kind in state:
                    place.to_local().copy_(state[kind].to_local())
                    self.leave([parameter], [kind], changed=True)
                state[kind] = place

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """optimizer.step(), unit by unit: only one unit's weights, gradients and state are in memory."""
        whole = [group["params"] for group in optimizer.param_groups]
        try:
            for number, unit in enumerate(self.units):
                members = set(unit)
                for group, parameters in zip(optimizer.param_groups, whole, strict=True):
                    group["params"] = [p for p in parameters if p in members]
                self.ahead(number + 1)
                optimizer.step()
                used = [p for p in unit if p.grad is not None]
                self.leave(used, ["grad"], changed=False)
                self.leave(used, ["weight", *STATE], changed=True)
        finally:
            for group, parameters in zip(optimizer.param_groups, whole, strict=True):
                group["params"] = parameters

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        """clip_grad_norm_, bit for bit, with one gradient in memory at a time. Returns the whole model's norm, 0-d."""
        graded = [p for p in parameters if p.grad is not None]
        norms = []
        for parameter in graded:
            norms.append(torch.linalg.vector_norm(parameter.grad))
            self.leave([parameter], ["grad"], changed=False)
        total = torch.linalg.vector_norm(torch.stack(norms))
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if scale < 1:
            for parameter in graded:
                parameter.grad.to_local().mul_(scale)
                self.leave([parameter], ["grad"], changed=True)
        return norm


def of(model: nn.Module) -> Tier | None:
    """The tier that holds a model's shards, if there is one."""
    return getattr(model, "_disk_tier", None)


def settle(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After a checkpoint has been loaded: what is in memory goes to the file."""
    if tier := of(model):
        tier.hold(optimizer)
        leave(model)


def leave(model: nn.Module) -> None:
    """After something that has used everything, as a checkpoint does."""
    if tier := of(model):
        for unit in tier.units:
            tier.leave(unit, changed=True)


def report(model: nn.Module) -> dict[str, float]:
    """For RESULT, of this rank: the file, and what has gone through memory since it was made."""
    if not (tier := of(model)):
        return {}
    sizes = {"offload_file": tier.size, "paged_in": tier.paged_in, "paged_out": tier.paged_out}
    return {f"{name}_gib": size / 2**30 for name, size in sizes.items()}


def visited(model: nn.Module, *, changed: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """named_parameters by name, to be read or changed; one on disk leaves memory when the next is asked for."""
    tier = of(model)
    for name, parameter in sorted(model.named_parameters()):
        yield name, parameter
        if tier:
            tier.leave([parameter], ["weight"], changed=changed)

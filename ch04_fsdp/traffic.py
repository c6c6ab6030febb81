"""Who holds which rows, and which collectives a step makes: by the rule, and as a live model makes them.

units = unit_parameters(model)                      # what is gathered together, by name
rows_of(rank, rows=10, ranks=4)                     # range(3, 6) for rank 1: rows are dealt in blocks of ceil(10 / 4)
expected(units, sharding, replicas=1, ranks=4)      # the collectives of a step, from shapes alone

with Traffic(model) as traffic:                     # the collectives of a step, as they happen
    loss = step.backward(...)
    step.update(...)
traffic.seen

Every collective of torch.distributed is an operator of torch's dispatcher, whoever calls it: FSDP from Python, DDP from
C++, the norm of DTensors. A dispatch mode sees them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ch01_intro.collectives import all_gather_single, reduce_scatter_single
from ch04_fsdp.sharding import Sharding, units

KINDS = {  # by the operator's name: c10d's own (DeepSpeed calls the coalesced ones), and those that DTensor calls
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",  # of a mixture of experts (chapter 5)
}
ROOT = "(root)"
Units = dict[str, list[nn.Parameter]]


@dataclass(frozen=True)
class Collective:
    """One call on this rank."""

    kind: str  # all_gather, reduce_scatter, all_reduce, all_to_all
    unit: str  # whose weights or gradients; "" for the norm, and for DDP's buckets
    phase: str  # forward, backward, update
    whole_bytes: int  # of its larger side, padding included: what the ranks' parts make together; of an all_to_all its
    # own, of which 1/N is for itself
    ranks: int

    @property
    def sent_bytes(self) -> float:
        """By each rank, if it is a ring: (N - 1) / N of the whole, and to all-reduce twice that."""
        return (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks * self.whole_bytes


def rows_of(rank: int, rows: int, ranks: int) -> range:
    """The rows that a rank holds. FSDP deals them as torch.chunk does: the last ranks may get fewer, or none."""
    block = math.ceil(rows / ranks)
    return range(min(rank * block, rows), min((rank + 1) * block, rows))


def padded(parameter: torch.Tensor, ranks: int) -> int:
    """Numbers of a parameter as it travels: each rank's rows filled up to the same count."""
    rows = parameter.shape[0]
    return math.ceil(rows / ranks) * ranks * (math.prod(parameter.shape[1:]))


def unit_parameters(model: nn.Module) -> Units:
    """The parameters that are gathered together, by the name of their unit. What no unit has belongs to the root."""
    names = {module: name.removeprefix("model.") for name, module in model.named_modules()}
    found: Units = {names[unit[-1]]: [p for module in unit for p in module.parameters()] for unit in units(model)}
    taken = {id(p) for parameters in found.values() for p in parameters}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return ({ROOT: rest} if rest else {}) | found


def expected(
    model_units: Units,
    sharding: Sharding,
    *,
    replicas: int,
    ranks: int,
    micro_batches: int = 1,
    sync_each: bool = False,
) -> list[Collective]:
    """The collectives of one training step, in no order. Replicate's gradients are one, however many buckets.

    Only layers are gathered a second time, in backward: the unit with the head stays, an embedding is not needed there.

    Args:
        replicas, ranks: the mesh: copies of the model, and ranks that share one.
    """
    parameters = [p for of_a_unit in model_units.values() for p in of_a_unit]
    if sharding.strategy == "replicate":
        whole = 4 * sum(p.numel() for p in parameters)
        return [Collective("all_reduce", "", "backward", whole, ranks)] if ranks > 1 else []
    found = []
    for unit, own in model_units.items():
        numbers = sum(padded(p, ranks) for p in own)
        gather = numbers * sharding.dtype.itemsize
        for number in range(micro_batches):
            found.append(Collective("all_gather", unit, "forward", gather, ranks))
            if sharding.reshards and unit.startswith("layers."):
                found.append(Collective("all_gather", unit, "backward", gather, ranks))
            if sync_each or number == micro_batches - 1:  # gradients travel in float32
                found.append(Collective("reduce_scatter", unit, "backward", 4 * numbers, ranks))
                found.append(Collective("all_reduce", unit, "backward", 4 * numbers // ranks, replicas))
    found.append(Collective("all_reduce", "", "update", 4 * len(parameters), ranks))  # a norm for each parameter
    return [collective for collective in found if collective.ranks > 1]


class Traffic(TorchDispatchMode):
    """Notes the collectives that this thread and its backward passes start while it is open."""

    def __init__(self, model: nn.Module | None = None) -> None:
        """model: to name the units of one under FSDP; its collectives of FSDP's are then called from here."""
        super().__init__()
        self.seen: list[Collective] = []
        self._unit = ""
        for path, module in model.named_modules() if model else ():
            if isinstance(module, FSDPModule):
                named = _Named(self, path.removeprefix("model.") or ROOT)
                module.set_custom_all_gather(named)  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(named)  # type: ignore[arg-type]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: what it sends comes by here again
        if func.namespace in ("c10d", "_c10d_functional") and func._opname in KINDS:
            self._note(KINDS[func._opname], args)
        return func(*args, **(kwargs or {}))

    def _note(self, kind: str, args: Sequence[Any]) -> None:
        ranks = _group(args).size()
        if ranks == 1:
            return  # nothing leaves
        sides = [sum(t.nbytes for t in pytree.tree_leaves(side) if torch.is_tensor(t)) for side in args[:2]]
        in_backward = torch._C._current_graph_task_id() != -1
        phase = "backward" if in_backward else "forward" if kind in ("all_gather", "all_to_all") else "update"
        # A hybrid unit's all_reduce follows its reduce_scatter at once, and so has its name.
        unit = "" if phase == "update" else self._unit
        self.seen.append(Collective(kind, unit, phase, max(sides), ranks))


class _Named:
    """FSDP's collectives of one unit: torch's own, and before them its name is noted."""

    def __init__(self, traffic: Traffic, unit: str) -> None:
        self.traffic, self.unit = traffic, unit

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: td.ProcessGroup, *args: Any, **more: Any
    ) -> td.Work | None:
        self.traffic._unit = self.unit
        call = all_gather_single if output_tensor.numel() > input_tensor.numel() else reduce_scatter_single
        return call(output_tensor, input_tensor, *args, group=group, **more)


def _group(args: Sequence[Any]) -> td.ProcessGroup:
    """The group of a collective's operator: c10d's have it as an object, the functional ones by its name, the last."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return td.ProcessGroup.unbox(arg)
    return td.distributed_c10d._resolve_process_group(args[-1])

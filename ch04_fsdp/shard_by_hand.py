"""Fully sharded data parallelism from scratch: a layer's weights are whole only while the layer computes.

You learn   the whole of FSDP in two hooks a layer: gather before it computes, forward and backward; free afterwards;
            and sum the gradients so that each rank gets those of its own piece. Why one flat vector a layer
Laptop      torchrun --standalone --nproc-per-node=2 ch04_fsdp/shard_by_hand.py --by-hand
ZeRO-2      torchrun --standalone --nproc-per-node=2 ch04_fsdp/shard_by_hand.py --by-hand --strategy grad
GPU node    torchrun --standalone --nproc-per-node=gpu ch04_fsdp/shard_by_hand.py --width 768 --heads 12 --layers 12
Cluster     srun python ch04_fsdp/shard_by_hand.py --width 768 --heads 12 --layers 12
You see     the losses of one process; a rank holds 1/N of the parameters, gradients and optimizer; the bytes on the
            wire, counted and by formula: 1.5 times those of data parallelism, as the weights travel twice.
            Rajbhandari et al., "ZeRO", arXiv:1910.02054, stage 3; Zhao et al., "PyTorch FSDP", arXiv:2304.11277
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ch02_hardware_parallelism import training
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.model import loss_sum
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share, token_count
from common import script


class Flat:
    """Parameters as one vector, of which each rank keeps a piece. `whole` has memory only while they are in use.

    One vector, because a message has a latency: a layer costs one all_gather, however many parameters it has; and any
    vector can be cut into equal pieces, whatever the shapes in it.
    """

    def __init__(self, places: dict[str, list[tuple[nn.Module, str]]], comm: Comm) -> None:
        """places: by parameter name, every module and attribute under which it is known: a tied one has two."""
        self.places, self.comm = places, comm
        parameters = [getattr(*found[0]) for found in places.values()]
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        trains = parameters[0].requires_grad
        flat = torch.cat([p.detach().flatten() for p in parameters])
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % comm.size)])
        self.shard = nn.Parameter(flat.chunk(comm.size)[comm.rank].clone(), requires_grad=trains)
        for module, name in [place for found in places.values() for place in found]:
            delattr(module, name)  # from now on a plain tensor: a view of `whole`
        self.whole = flat.requires_grad_(trains)  # a leaf: its gradient is the gradient of all, in one vector
        self.bytes = flat.untyped_storage().nbytes()
        self.free()
        if trains:
            self.whole.register_post_accumulate_grad_hook(self.reduce)

    def gather(self) -> None:
        if not self.whole.untyped_storage().nbytes():
            self.whole.untyped_storage().resize_(self.bytes)
            self.whole.data.copy_(self.comm.all_gather(self.shard.data))  # .data: not a change that autograd must know

    def free(self) -> None:
        """Give the memory back. Views of it that autograd has saved are valid again after the next gather."""
        self.whole.untyped_storage().resize_(0)

    def attach(self) -> None:
        """Let the modules see their parameters, as views through which gradients flow back into `whole`."""
        for view, found in zip(self.views(self.whole), self.places.values(), strict=True):
            for module, name in found:
                setattr(module, name, view)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat[: sum(self.sizes)].split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def reduce(self, whole: torch.Tensor) -> None:
        """Backward has all of this vector's gradients: sum them over the ranks, keep those of this rank's piece."""
        own = self.comm.reduce_scatter(whole.grad)
        self.shard.grad = own if self.shard.grad is None else self.shard.grad + own
        whole.grad = None


class Unit:
    """What is gathered and freed together: the parameters of `modules`, frozen ones in a vector of their own."""

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module], comm: Comm) -> None:
        names = {p: name for name, p in model.named_parameters()}
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in (inner for outer in modules for inner in outer.modules()):
            for name, parameter in module.named_parameters(recurse=False):
                places.setdefault(parameter, []).append((module, name))
        groups = [{names[p]: at for p, at in places.items() if p.requires_grad == trains} for trains in (True, False)]
        self.flats = [Flat(group, comm) for group in groups if group]

    def gather(self, *_: object) -> None:
        for flat in self.flats:
            flat.gather()

    def begin(self, *_: object) -> None:
        self.gather()
        for flat in self.flats:
            flat.attach()

    def free(self, *_: object) -> None:
        for flat in self.flats:
            flat.free()


class FullShardByHand(Strategy):
    """Each rank holds a piece of every unit, and takes a share of every micro-batch."""

    reshards = True

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.model, self.comm = model, comm
        layers = [Unit(model, [block], comm) for block in model.blocks]
        root = Unit(model, [model.embedding, model.norm, model.head], comm)  # with what is tied across them
        model.register_forward_pre_hook(root.begin)
        for block, unit in zip(model.blocks, layers, strict=True):
            block.register_forward_pre_hook(unit.begin)
            if self.reshards:
                block.register_forward_hook(unit.free)
                block.register_full_backward_pre_hook(unit.gather)
            # After its backward; the module's own hook would come before the gradients of its parameters.
            for flat in unit.flats:
                if flat.shard.requires_grad:
                    flat.whole.register_post_accumulate_grad_hook(unit.free)
        self.units = [root, *layers]
        self.flats = [flat for unit in self.units for flat in unit.flats]
        self.optimizer = make_optimizer(flat.shard for flat in self.flats if flat.shard.requires_grad)

    @classmethod
    def wire_bytes(cls, model: nn.Module, micro_batches: list[Batch], ranks: int) -> int:  # type: ignore[override]
        """Payload that all ranks send in a step: (N-1) x a padded vector for each gather and each reduction. In every
        micro-batch a layer is gathered twice (once, if kept for backward), the root once; each is reduced once."""

        def padded(modules: Iterable[nn.Module], trains: bool) -> int:
            found = {p for module in modules for p in module.parameters() if p.requires_grad == trains}
            numbers = sum(p.numel() for p in found)
            return numbers + -numbers % ranks

        root = [model.embedding, model.norm, model.head]
        numbers = 2 * padded(root, True) + padded(root, False)
        gathers = 2 if cls.reshards else 1
        for block in model.blocks:
            numbers += (gathers + 1) * padded([block], True) + gathers * padded([block], False)
        return (ranks - 1) * (numbers * len(micro_batches) + 2 * 2) * next(model.parameters()).element_size()

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        tokens, total = token_count(micro_batches), self.flats[0].shard.new_zeros(2)
        for batch in micro_batches:
            inputs_bt, targets_bt = share(batch, self.comm.rank, self.comm.size)
            loss = loss_sum(self.model(inputs_bt), targets_bt) / tokens
            loss.backward()
            total[0] += loss.detach()
            for unit in self.units:  # the root, and what had no gradient to wait for
                unit.free()
        self.comm.all_reduce(total)
        return total[0]

    def _by_name(self, whole: list[torch.Tensor], flats: list[Flat]) -> dict[str, torch.Tensor]:
        return {
            name: view
            for flat, vector in zip(flats, whole, strict=True)
            for name, view in zip(flat.places, flat.views(vector), strict=True)
        }

    def gradients(self) -> dict[str, torch.Tensor]:
        trained = [flat for flat in self.flats if flat.shard.grad is not None]
        return self._by_name([self.comm.all_gather(flat.shard.grad) for flat in trained], trained)

    def weights(self) -> dict[str, torch.Tensor]:
        return self._by_name([self.comm.all_gather(flat.shard.detach()) for flat in self.flats], self.flats)

    def squared_norm(self) -> torch.Tensor:
        squares = torch.stack([f.shard.grad.square().sum() for f in self.flats if f.shard.grad is not None]).sum()
        self.comm.all_reduce(squares)
        return squares


class GradShardByHand(FullShardByHand):
    """The weights stay whole between forward and backward: one gather less, and all weights in memory at the turn."""

    reshards = False


def main(argv: list[str] | None = None) -> dict:
    flags = training.flags(__doc__, by_hand=True)
    flags.add_argument("--strategy", choices=("full", "grad"), default="full", help="free the weights after forward?")
    args = flags.parse_args(argv)
    run = script.start(__file__, args)

    def report(strategy: Strategy) -> dict:
        held = sum(flat.shard.numel() for flat in strategy.flats)
        whole = sum(flat.whole.numel() for flat in strategy.flats)
        return {"share_held": held / whole, "parameters_per_rank": held}

    made = FullShardByHand if args.strategy == "full" else GradShardByHand
    return training.train_beside_one_process(made, args, run, report)


if __name__ == "__main__":
    script.run(main)

"""Tensor parallelism from scratch: every matrix cut between the ranks, two sums a layer forward and two backward.

You learn   which matrix to cut by columns and which by rows, where a gradient must be summed and where it must not,
            how to take a cross-entropy over a vocabulary that no rank holds as a whole, what all that costs in bytes
Laptop      torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/tensor_parallel.py --by-hand
Sequences   the same with --sequence-parallel: t is cut too, where the matrices are not
The library torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/tensor_parallel.py \
                --strategy library-tensor   (DTensor; library-sequence)
A grid      torchrun --standalone --nproc-per-node=4 ch02_hardware_parallelism/tensor_parallel.py \
                --strategy tensor-x-data    (2 x 2)
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/tensor_parallel.py \
                --width 2048 --heads 16 --layers 8 --seq-len 1024
Cluster     srun python ch02_hardware_parallelism/tensor_parallel.py --heads 16   (one task a GPU, all on one node)
You see     the losses of one process, 1/N of nearly all parameters on each rank, and as many bytes as the formula says
"""

from __future__ import annotations

import torch
from torch import nn

from ch02_hardware_parallelism import alpha_beta, harness, training
from ch02_hardware_parallelism import model as models
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.strategy import (
    Batch,
    MakeOptimizer,
    Strategy,
    gather_in_one_message,
    token_count,
    trainable,
)
from ch02_hardware_parallelism.tensor_layers import (
    Boundary,
    ColumnLinear,
    RowLinear,
    VocabCrossEntropy,
    VocabEmbedding,
    unchanged,
)
from common import logs, script

FAMILY = ("tensor-parallel", "sequence-parallel", "tensor-x-data", "library-tensor", "library-sequence")


def gradients_cross(model: models.Transformer) -> tuple[int, int]:
    """Out of how many begins of parallel regions a gradient comes, and into how many ends one goes.

    All 2 layers + 1 of each, unless all that lies behind is frozen. An attention and an MLP are a region each; besides
    the embedding of words has an end, and the head a begin.
    """

    def learns(*parts: nn.Module) -> bool:
        return any(p.requires_grad for part in parts for p in part.parameters())

    behind = learns(model.embedding.token)
    begins, ends = 0, int(behind)
    behind |= learns(model.embedding.position)
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        for norm, columns, row in (
            (block.norm1, (attention.q, attention.k, attention.v), attention.out),
            (block.norm2, (mlp.up,), mlp.down),
        ):
            behind |= learns(norm)
            begins += behind
            behind |= learns(*columns) or row.weight.requires_grad
            ends += behind
            behind |= row.bias.requires_grad
    return begins + (behind or learns(model.norm)), ends


def wire_bytes(model: models.Transformer, micro_batches: list[Batch], ranks: int) -> int:
    """Payload bytes that all ranks together send in a step.

    All_reduces of [b, t, d]: forward the embedding, and each layer's attention and MLP; backward the inputs of each
    layer's attention and MLP, and of the head. That is 4 layers + 2. Three numbers a token for the loss.
    """
    begins, _ = gradients_cross(model)
    numbers = token_count(micro_batches) * ((2 * model.shape.layers + 1 + begins) * model.shape.width + 3)
    return alpha_beta.total_wire_bytes("all_reduce", numbers * model.norm.weight.element_size(), ranks)


def indivisible(ranks: int, **sizes: int) -> str | None:
    """Which of the sizes cannot be cut into `ranks` equal parts, and what to change."""
    for name, size in sizes.items():
        if size % ranks:
            name = name.replace("_", " ")
            return f"{name} {size} does not divide by {ranks} ranks; make it a multiple of {ranks}, or change the ranks"
    return None


class TensorParallel(Strategy):
    """Each rank holds a slice of every matrix and works on the whole batch (Megatron-LM, arXiv:1909.08053).

    What is not cut (norms, positions, biases of row layers) is on every rank, and its gradients need no sum: between
    the parallel regions all ranks compute the same from the same numbers, and where a gradient comes out of a region it
    has been summed (enter). Copies that start equal stay equal.
    """

    wire_bytes = staticmethod(wire_bytes)

    def __init__(self, model: models.Transformer, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        """Cuts `model`, which must be the same on every rank; its layers are replaced."""
        self.comm = comm
        self.shard(model)
        super().__init__(model, comm, make_optimizer)
        self.shard_dims = {  # by parameter name; a tied weight is here under both of its names
            f"{path}.{name}": dim
            for path, layer in model.named_modules()
            for name, dim in getattr(layer, "shard_dims", {}).items()
        }

    @staticmethod
    def why_not(model: models.Transformer, ranks: int) -> str | None:
        shape = model.shape
        return indivisible(ranks, heads=shape.heads, MLP_width=shape.mlp, vocabulary=shape.vocab)

    # ------------------------------------------------------------ cutting the model

    def shard(self, model: models.Transformer) -> None:
        for block in model.blocks:
            attention, mlp = block.attention, block.mlp
            attention.q, attention.k, attention.v = map(self.column, (attention.q, attention.k, attention.v))
            attention.out = self.row(attention.out)  # cut between heads: a head's k columns stay together
            mlp.up, mlp.down = self.column(mlp.up), self.row(mlp.down)
            self.begin_region_at(attention)  # once for q, k and v: three times would send three times the bytes
            self.begin_region_at(mlp)
        model.embedding.token, model.head = self.shard_vocabulary(model.embedding.token, model.head)
        self.begin_region_at(model.head)

    def shard_vocabulary(self, token: nn.Embedding, head: nn.Linear) -> tuple[nn.Module, nn.Module]:
        """Both are cut between words, so that tied ones can share one shard."""
        embedding, column = self.embedding(token), self.column(head)
        if head.weight is token.weight:
            column.weight = embedding.weight
        return embedding, column

    def column(self, whole: nn.Linear) -> nn.Module:
        return ColumnLinear(whole, self.comm)

    def row(self, whole: nn.Linear) -> nn.Module:
        return RowLinear(whole, self.comm, self.leave)

    def embedding(self, whole: nn.Embedding) -> nn.Module:
        return VocabEmbedding(whole, self.comm, self.leave)

    def begin_region_at(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(lambda _, inputs: (self.enter(inputs[0]),))

    def enter(self, x_btd: torch.Tensor) -> torch.Tensor:
        """Where a parallel region begins, Megatron's f: identity forward, all_reduce backward.

        Every rank uses all of x with its own slice of the weight, so each has one term of the gradient of x.
        """
        return Boundary.apply(x_btd, unchanged, self.summed)

    def leave(self, x_btd: torch.Tensor) -> torch.Tensor:
        """Where it ends, Megatron's g: all_reduce forward, identity backward.

        The gradient of a term is that of the sum, and every rank has it: each computes the same from there on.
        """
        return Boundary.apply(x_btd, self.summed, unchanged)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in a tensor of its own: autograd may need x as it was."""
        total = x.clone(memory_format=torch.contiguous_format)
        self.comm.all_reduce(total)
        return total

    # ------------------------------------------------------------ a step

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        tokens = token_count(micro_batches)
        loss = next(self.model.parameters()).new_zeros(())
        for batch in micro_batches:
            inputs_bt, targets_bt = self.my_share(batch)
            part = self.loss_sum(self.model(inputs_bt), targets_bt) / tokens
            part.backward()
            loss += part.detach()
        self.synchronize(loss)
        return loss

    def my_share(self, batch: Batch) -> Batch:
        """All of it: the ranks share out the model, not the data."""
        return batch

    def loss_sum(self, logits_btV: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        return VocabCrossEntropy.apply(logits_btV, targets_bt, self.comm).sum()

    def synchronize(self, loss: torch.Tensor) -> None:
        """After the last micro-batch. Nothing is left to sum, neither gradients (see above) nor the loss."""

    # ------------------------------------------------------------ what the ranks hold together

    def gradients(self) -> dict[str, torch.Tensor]:
        return gather_in_one_message(super().gradients(), self.shard_dims, self.comm)

    def weights(self) -> dict[str, torch.Tensor]:
        return gather_in_one_message(super().weights(), self.shard_dims, self.comm)

    def squared_norm(self) -> torch.Tensor:
        """Shards are summed over the ranks; copies are counted once, though every rank has them."""
        sharded, replicated = self.gradients_held()
        total = self.sum_of_squares(sharded)
        self.comm.all_reduce(total)
        return total + self.sum_of_squares(replicated)

    def gradients_held(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """This rank's gradients: those of its shards, and those of what every rank has."""
        held = [(name in self.shard_dims, p.grad) for name, p in trainable(self.model) if p.grad is not None]
        return [grad for cut, grad in held if cut], [grad for cut, grad in held if not cut]

    def sum_of_squares(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        total = next(self.model.parameters()).new_zeros(())
        for gradient in gradients:
            total += gradient.square().sum()
        return total


def held(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank stores of it. (A DTensor of the library's gives the size of the whole.)"""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def main(argv: list[str] | None = None) -> dict:
    parser = training.flags(__doc__, by_hand=True)
    parser.add_argument("--strategy", choices=FAMILY, default=FAMILY[0])
    parser.add_argument("--sequence-parallel", dest="strategy", action="store_const", const="sequence-parallel")
    args = parser.parse_args(argv)
    if args.by_hand and args.strategy.startswith("library"):
        raise script.UserError(
            "--by-hand cannot count what the library sends; leave it out, or take another --strategy"
        )
    run = script.start(__file__, args)
    _, make = harness.resolve(args.strategy)

    def report(strategy: Strategy) -> dict:
        return {"parameters_per_rank": sum(held(p).numel() for p in strategy.model.parameters())}

    result = training.train_beside_one_process(make, args, run, report)
    if logs.env_rank() == 0:
        mine, all_of_them = result["parameters_per_rank"], result["parameters"]
        print(f"parameters a rank: {mine:,} of {all_of_them:,} ({mine / all_of_them:.1%})")
        peak = result["peak_mem_gib"]
        print(f"a step: {result['step_ms']:.1f} ms" + (f"; peak memory of rank 0: {peak:.2f} GiB" if peak else ""))
    return result


if __name__ == "__main__":
    script.run(main)

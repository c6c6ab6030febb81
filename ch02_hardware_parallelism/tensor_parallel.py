"""Tensor parallelism from scratch: every matrix cut between the ranks, two sums a layer forward and two backward.

You learn   which matrix to cut by columns and which by rows, where a gradient must be summed and where it must not,
            how to take a cross-entropy over a vocabulary that no rank holds as a whole, what all that costs in bytes
Laptop      torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/tensor_parallel.py --by-hand
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/tensor_parallel.py --width 2048 \
                --heads 16 --layers 8 --vocab 50304 --seq-len 1024 --batch-size 8
Cluster     srun python ch02_hardware_parallelism/tensor_parallel.py   (one task a GPU; keep it within one node)
You see     the losses of one process, 1/N of almost all parameters on each rank, as many bytes as the formula says

Also with --sequence-parallel, or any --strategy of its family: the library's (DTensor), or a grid with data parallelism.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ch02_hardware_parallelism import alpha_beta, harness
from ch02_hardware_parallelism import model as models
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.model import Shape
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, token_count, trainable
from ch02_hardware_parallelism.tensor_layers import (
    ColumnLinear, CopyToRanks, RowLinear, SumOfRanks, VocabCrossEntropy, VocabEmbedding,
)  # fmt: skip
from common import dist, profiling, script

FAMILY = ("tensor-parallel", "sequence-parallel", "tensor-x-data", "library-tensor", "library-sequence")


def wire_bytes(shape: Shape, tokens: int, ranks: int, itemsize: int) -> int:
    """Payload bytes that all ranks together send in a step of `tokens` tokens (of all micro-batches), all trainable.

    All_reduces of [b, t, d]: forward the embedding, and each layer's attention and MLP; backward the inputs of each
    layer's attention and MLP, and of the head. That is 4 layers + 2. Three numbers a token for the loss.
    """
    numbers = tokens * ((4 * shape.layers + 2) * shape.width + 3)
    return alpha_beta.total_wire_bytes("all_reduce", numbers * itemsize, ranks)


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
    has been summed (CopyToRanks). Copies that start equal stay equal.
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
        """What a parallel region begins with."""
        return CopyToRanks.apply(x_btd, self.comm)

    def leave(self, x_btd: torch.Tensor) -> torch.Tensor:
        """What it ends with."""
        return SumOfRanks.apply(x_btd, self.comm)

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

    def gather(self, name: str, part: torch.Tensor) -> torch.Tensor:
        return self.comm.all_gather(part, self.shard_dims[name]) if name in self.shard_dims else part

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: self.gather(name, p.grad) for name, p in trainable(self.model) if p.grad is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: self.gather(name, p.detach()) for name, p in self.model.named_parameters()}

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


# ---------------------------------------------------------------- the script


def synthetic(shape: Shape, sequences: int, generator: torch.Generator, device: torch.device) -> Batch:
    """Sequences that count up in steps of 1 to 4, from anywhere: what comes next can be learnt."""
    start_b1, stride_b1 = (torch.randint(*span, (sequences, 1), generator=generator)
                           for span in ((0, shape.vocab), (1, 5)))  # fmt: skip
    tokens_bt = ((start_b1 + stride_b1 * torch.arange(shape.context + 1)) % shape.vocab).to(device)
    return tokens_bt[:, :-1].contiguous(), tokens_bt[:, 1:].contiguous()


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def batches(shape: Shape, args: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(args.seed)  # the same on every rank
    for _ in range(args.steps):
        yield synthetic(shape, args.batch_size, generator, device)


def one_process(shape: Shape, args: argparse.Namespace, device: torch.device) -> list[float]:
    """The losses that the ranks together must reproduce."""
    model = models.build(shape, seed=args.seed).to(device)
    optimizer, losses = sgd(model.parameters()), []
    for inputs_bt, targets_bt in batches(shape, args, device):
        loss = models.loss_sum(model(inputs_bt), targets_bt) / targets_bt.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--width", type=script.at_least(1), default=192)
    parser.add_argument("--heads", type=script.at_least(1), default=12)
    parser.add_argument("--layers", type=script.at_least(1), default=4)
    parser.add_argument("--vocab", type=script.at_least(8), default=768)
    parser.add_argument("--seq-len", type=script.at_least(2), default=48)
    parser.add_argument("--batch-size", type=script.at_least(1), default=8, help="sequences a step, of all ranks")
    parser.add_argument("--steps", type=script.at_least(2), default=6)
    parser.add_argument("--strategy", choices=FAMILY, default=FAMILY[0])
    parser.add_argument("--sequence-parallel", dest="strategy", action="store_const", const="sequence-parallel")
    parser.add_argument("--by-hand", action="store_true", help="collectives from send and receive: bytes are counted")
    parser.add_argument("--no-reference", action="store_true", help="do not train the whole model on rank 0 as well")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    run = script.start(__file__, args)
    ranks = dist.read_launch().world_size
    _, make = harness.resolve(args.strategy)
    shape = Shape(args.vocab, args.width, args.heads, args.layers, args.seq_len)
    with torch.device("meta"):
        plan = models.Transformer(shape)
    why_not = make.why_not(plan, ranks) or (indivisible(args.heads, width=args.width) or "").replace("ranks", "heads")
    if why_not:
        raise script.UserError(f"{args.strategy}: {why_not}")
    with dist.session(args.device) as ctx:
        comm = Comm(by_hand=args.by_hand)
        strategy = make(models.build(shape, seed=args.seed).to(ctx.device), comm, sgd)
        profiling.reset_peak_memory(ctx.device)
        timer, losses = profiling.StepTimer(ctx.device), []
        for number, batch in enumerate(batches(shape, args, ctx.device), 1):
            before = comm.total_sent_bytes()
            timer.restart()
            loss = strategy.backward([batch])
            strategy.update()
            timer.end_step()
            sent = comm.total_sent_bytes() - before
            losses.append(loss.item())
            ms = timer.rows_ms()[-1]["step"]
            run.log(step=number, loss=losses[-1], ms=ms)
            if ctx.is_main:
                print(f"step {number}  loss {losses[-1]:.4f}  {ms:.1f} ms", flush=True)
        peak = profiling.memory(ctx.device)
        result = {
            "world_size": ranks,
            "loss_last": losses[-1],
            "parameters_per_rank": sum(held(p).numel() for p in strategy.model.parameters()),
            "parameters": sum(p.numel() for p in plan.parameters()),
            "wire_bytes_per_step": sum(ctx.gather(sent)) if args.by_hand else None,
            "wire_bytes_formula": make.wire_bytes(shape, args.batch_size * args.seq_len, ranks, 4),
            "step_ms": timer.median_ms()["step"],
            "peak_mem_gib": peak.peak_gib,
        }
        if ctx.is_main and not args.no_reference:
            wanted = one_process(shape, args, ctx.device)
            result["largest_loss_difference"] = max(abs(x - y) for x, y in zip(losses, wanted, strict=True))
        ctx.barrier("compared")
        if ctx.is_main:
            show(result, args, peak.source)
        return result


def held(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank stores of it; the library's DTensor says the size of the whole."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def show(result: dict, args: argparse.Namespace, memory_source: str) -> None:
    share = result["parameters_per_rank"] / result["parameters"]
    print(f"parameters  {result['parameters_per_rank']:,} a rank of {result['parameters']:,} ({share:.1%})")
    counted = result["wire_bytes_per_step"]
    print(f"bytes sent  {'not counted (--by-hand does)' if counted is None else f'{counted:,}'} a step by all ranks, "
          f"by formula {result['wire_bytes_formula']:,}")  # fmt: skip
    print(f"a step      {result['step_ms']:.1f} ms, peak {result['peak_mem_gib']:.2f} GiB a rank ({memory_source})")
    if not args.no_reference:
        print(f"losses      differ from one process by {result['largest_loss_difference']:.1e} at most")


if __name__ == "__main__":
    script.run(main)

"""Data parallelism from scratch: one all_reduce over the gradients, then buckets that leave while backward goes on.

You learn   why every rank must start from the same weights, what to divide by, when a bucket may leave, and why only
            after the last micro-batch
Laptop      torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/data_parallel.py
The library torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/data_parallel.py --kind ddp
Counted     torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/data_parallel.py --by-hand
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/data_parallel.py --width 768
Cluster     srun python ch02_hardware_parallelism/data_parallel.py --width 768 --layers 12
You see     the losses of one process to seven digits, and 2 (N-1) x gradient bytes on the wire, counted and by formula.
            How much of that the buckets hide: overlap.py
"""

from __future__ import annotations

import torch
from torch import nn

from ch02_hardware_parallelism import training
from ch02_hardware_parallelism.comm import Comm, Handle
from ch02_hardware_parallelism.library_data import LibraryDDP
from ch02_hardware_parallelism.model import loss_sum
from ch02_hardware_parallelism.strategy import (
    Batch,
    MakeOptimizer,
    Strategy,
    share,
    sum_in_one_message,
    token_count,
    trainable,
    trainable_bytes,
)
from common import script


def wire_bytes(model: nn.Module, micro_batches: list[Batch], ranks: int) -> int:
    """Payload that all ranks send in a step, whatever its batch: an all_reduce moves each byte 2 (N-1) times, of all
    gradients and of two numbers for the loss."""
    return 2 * (ranks - 1) * (trainable_bytes(model) + 2 * next(model.parameters()).element_size())


class DataParallel(Strategy):
    """Each rank holds the whole model and takes a share of every micro-batch; the gradients are summed at the end."""

    wire_bytes = staticmethod(wire_bytes)

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        super().__init__(model, comm, make_optimizer)
        with torch.no_grad():  # all start from rank 0's weights
            flat = nn.utils.parameters_to_vector(model.parameters())
            comm.broadcast(flat)
            sizes = [p.numel() for p in model.parameters()]
            for parameter, part in zip(model.parameters(), flat.split(sizes), strict=True):
                parameter.copy_(part.view_as(parameter))

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        divisor = self.divisor(micro_batches)
        seen = next(self.model.parameters()).new_zeros(2)  # sum of the losses, tokens
        for number, batch in enumerate(micro_batches):
            self.begin(last=number == len(micro_batches) - 1)
            inputs_bt, targets_bt = self.share(batch)
            loss = loss_sum(self.model(inputs_bt), targets_bt)
            (loss / divisor).backward()
            seen += torch.stack([loss.detach(), loss.new_tensor(targets_bt.numel())])
        self.synchronize()
        self.comm.all_reduce(seen)
        return seen[0] / seen[1]

    def divisor(self, micro_batches: list[Batch]) -> int:
        """All tokens of the step, so that the sum over ranks is the mean over tokens.

        To average over N ranks what each has averaged over its own tokens is the same only while all have equally many.
        """
        return token_count(micro_batches)

    def share(self, batch: Batch) -> Batch:
        return share(batch, self.comm.rank, self.comm.size)

    def begin(self, *, last: bool) -> None:
        """Called before each micro-batch."""

    def synchronize(self) -> None:
        """Sum the gradients over the ranks: in one message, since each message costs its latency."""
        sum_in_one_message([p.grad for _, p in trainable(self.model)], self.comm)


class Bucket:
    """Gradients that travel together: one flat buffer, of which each parameter's .grad is a view. No copies."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.flat = parameters[0].new_zeros(sum(p.numel() for p in parameters))
        self.waiting = len(parameters)  # for so many gradients
        self.handle: Handle | None = None
        for parameter, view in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = view.view_as(parameter)


class BucketedDataParallel(DataParallel):
    """The same sums, a bucket at a time: it leaves as soon as its last gradient is there, while backward goes on.

    Backward reaches the last layers first, so buckets are filled from the end of the model. They leave in that order on
    every rank: a collective has no name, the n-th of one rank meets the n-th of another.
    """

    bucket_bytes = 2**20  # DDP's default is 25 MiB; the models of this chapter have about 15 MiB of gradients

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        super().__init__(model, comm, make_optimizer)
        self.buckets = [Bucket(parameters) for parameters in self.fill()]
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.hooks = [p.register_post_accumulate_grad_hook(self.on_gradient) for p in self.bucket_of]
        self.last, self.next = False, 0

    def fill(self) -> list[list[nn.Parameter]]:
        """Parameters from the last to the first, a new bucket whenever one is full."""
        buckets: list[list[nn.Parameter]] = []
        room = 0
        for _, parameter in reversed(trainable(self.model)):
            if room <= 0:
                buckets.append([])
                room = self.bucket_bytes
            buckets[-1].append(parameter)
            room -= parameter.numel() * parameter.element_size()
        return buckets

    def begin(self, *, last: bool) -> None:
        self.last = last

    def on_gradient(self, parameter: nn.Parameter) -> None:
        """Autograd has added to this parameter's .grad. Before the last micro-batch that stays here."""
        if self.last:
            self.bucket_of[parameter].waiting -= 1
            self.leave(only_ready=True)

    def leave(self, *, only_ready: bool) -> None:
        while self.next < len(self.buckets) and not (only_ready and self.buckets[self.next].waiting):
            bucket = self.buckets[self.next]
            bucket.handle = self.comm.all_reduce(bucket.flat, async_op=True)
            self.next += 1

    def synchronize(self) -> None:
        self.leave(only_ready=False)  # parameters that took no part in this step have called no hook
        for bucket in self.buckets:
            assert bucket.handle is not None
            bucket.handle.wait()
            bucket.waiting, bucket.handle = len(bucket.parameters), None
        self.next = 0

    def update(self) -> None:
        self.optimizer.step()
        for bucket in self.buckets:
            bucket.flat.zero_()  # not None: .grad must stay a view

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def main(argv: list[str] | None = None) -> dict:
    parser = training.flags(__doc__, by_hand=True)
    parser.add_argument("--kind", choices=("naive", "bucketed", "ddp"), default="bucketed", help="ddp: the library's")
    args = parser.parse_args(argv)
    if args.by_hand and args.kind == "ddp":
        raise script.UserError("--by-hand cannot count what the library sends; leave it out, or take another --kind")
    run = script.start(__file__, args)
    strategy = {"naive": DataParallel, "bucketed": BucketedDataParallel, "ddp": LibraryDDP}[args.kind]
    return training.train_beside_one_process(strategy, args, run)


if __name__ == "__main__":
    script.run(main)

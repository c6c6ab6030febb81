"""Pipeline parallelism from scratch: a transformer cut into stages, GPipe and 1F1B from nothing but send and receive.

You learn   who sends what to whom and when, what the bubble costs and what makes it small, why 1F1B replaced GPipe
            (memory, not speed), and what goes wrong: loss scaling, a tied embedding with an end in two stages
Laptop      torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/pipeline_parallel.py --schedule 1f1b
The library torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/pipeline_parallel.py --kind library
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/pipeline_parallel.py --width 1536 \
                --layers 32 --seq-len 512 --batch-size 64 --chunks 32
Cluster     srun python ch02_hardware_parallelism/pipeline_parallel.py --layers 64 --chunks 64 --batch-size 64
You see     the losses of one process, a bubble near (p-1) / (m+p-1), bytes that do not depend on the number of chunks,
            timeline.png: one row a stage, what it computed when; 1F1B holds p - stage activations, GPipe all m

p stages, m micro-batches ("chunks": each of the harness's micro-batches is cut once more). Shapes: b sequences,
t positions, d model width. Huang et al., "GPipe" (arXiv:1811.06965); 1F1B is PipeDream-Flush in Narayanan et al.
(arXiv:2006.09503), with the formulas in "Efficient Large-Scale Language Model Training" (arXiv:2104.04473).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as td
from torch import nn

from ch02_hardware_parallelism import harness, training
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.model import build, loss_sum
from ch02_hardware_parallelism.schedules import Op, bubble_formula, peak_live, schedule
from ch02_hardware_parallelism.stages import Stage, gradient_flows, wire_bytes
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, token_count
from ch02_hardware_parallelism.timeline import Event, bubble, busy_s, draw, nobody_s, span_s
from common import dist, script
from common.logs import get_logger


class GPipe(Strategy):
    """Rank r is stage r. Every message goes to a neighbour: activations [b, t, d] forward, their gradients back.

    All ranks are given the same whole model, and keep their stage of it.
    """

    kind = "gpipe"
    chunks = 4
    wire_bytes = staticmethod(wire_bytes)

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.stage, self.stages = comm.rank, comm.size
        self.first, self.last = self.stage == 0, self.stage == self.stages - 1
        self.model, self.comm = Stage(model, self.stage, self.stages), comm
        self.optimizer = make_optimizer(self.model.parameters())  # frozen ones too: a stage may have no others
        self.flows = gradient_flows(model, self.stages)
        self.width, self.like = model.shape.width, model.norm.weight.new_empty(0)  # like: dtype and device
        self.tied = model.head.weight if model.shape.tied and self.stages > 1 and (self.first or self.last) else None
        self.live: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # chunk: input and output, until its backward
        self.arrived: dict[Op, torch.Tensor] = {}  # what the neighbours sent for an operation to come
        self.peak_live = 0
        self.events: list[Event] | None = None  # a list here: times are recorded in it

    @classmethod
    def why_not(cls, model: nn.Module, ranks: int) -> str | None:
        most = len(model.blocks)
        return f"{ranks} stages for {most} block(s); start at most {most} rank(s)" if ranks > most else None

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        self.tokens, self.loss = token_count(micro_batches), self.like.new_zeros(())
        for batch in micro_batches:
            self.run_round(batch)
        self.synchronize()
        self.share_loss()
        return self.loss

    def run_round(self, batch: Batch) -> None:
        """One micro-batch, cut into chunks, through the pipeline and back; all stages are idle at its end."""
        self.pieces = self.cut(batch)
        for done, following in itertools.pairwise([None, *self.order(), None]):
            self.exchange(done, following)
            if following:
                self.compute(following)

    def order(self) -> list[Op]:
        return schedule(self.kind, self.stage, self.stages, self.chunks)

    def cut(self, batch: Batch) -> list[Batch]:
        """The chunks: all ranks know the sizes, also where they are uneven.

        Raises:
            UserError: fewer sequences than chunks.
        """
        inputs_bt, targets_bt = batch
        if len(inputs_bt) < self.chunks:
            raise script.UserError(f"{self.chunks} chunks of {len(inputs_bt)} sequences; take fewer or a larger batch")
        return list(zip(inputs_bt.tensor_split(self.chunks), targets_bt.tensor_split(self.chunks), strict=True))

    def exchange(self, done: Op | None, following: Op | None) -> None:
        """Send what `done` made while receiving what `following` needs.

        Together, for in 1F1B two neighbours have something for each other at the same time: if each waited until the
        other has taken it, and received only then, both would wait for ever. Waiting for all of it before going on
        costs nothing where the stages are equally fast: the bubble is still the formula's.
        """
        sends, receives = [], []
        if done and done[0] == "forward" and not self.last:
            sends.append((self.live[done[1]][1].detach().contiguous(), self.stage + 1))
        elif done and done[0] == "backward" and not self.first and self.flows[self.stage - 1]:
            sends.append((self.input_gradient_btd.contiguous(), self.stage - 1))
        source = self.source(following)
        if source is not None:
            rows, positions = self.pieces[following[1]][0].shape
            self.arrived[following] = self.like.new_empty(rows, positions, self.width)
            receives.append((self.arrived[following], source))
        self.comm.peers.exchange(sends, receives)

    def source(self, op: Op | None) -> int | None:
        """The stage whose message `op` waits for, if any."""
        if op and op[0] == "forward":
            return None if self.first else self.stage - 1
        return self.stage + 1 if op and not self.last and self.flows[self.stage] else None

    def compute(self, op: Op) -> None:
        begin = self.clock()
        kind, chunk = op
        (self.forward_chunk if kind == "forward" else self.backward_chunk)(chunk)
        if self.events is not None:
            self.events.append(Event(begin, self.clock(), kind, chunk))

    def clock(self) -> float:
        if self.events is not None and self.like.is_cuda:
            torch.cuda.synchronize()  # else the time would be that of queueing the kernels
        return time.perf_counter()

    def forward_chunk(self, chunk: int) -> None:
        x = self.pieces[chunk][0] if self.first else self.arrived.pop(("forward", chunk))
        x.requires_grad_(not self.first and self.flows[self.stage - 1])
        out = self.model(x)
        if self.last:
            out = self.chunk_loss(out, self.pieces[chunk][1])
            self.loss += out.detach()
        self.live[chunk] = x, out
        self.peak_live = max(self.peak_live, len(self.live))

    def chunk_loss(self, logits_btv: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        """A chunk's part of the step's mean loss. Chunks may differ in size: a mean of their means would be wrong."""
        return loss_sum(logits_btv, targets_bt) / self.tokens

    def backward_chunk(self, chunk: int) -> None:
        x, out = self.live.pop(chunk)
        if out.requires_grad:  # not so where all up to here is frozen
            torch.autograd.backward(out, self.arrived.pop(("backward", chunk), None))
        self.input_gradient_btd = x.grad

    def synchronize(self) -> None:
        """Once a step, after all chunks of all micro-batches."""
        self.sum_tied_gradient()

    def sum_tied_gradient(self) -> None:
        """The first stage holds the embedding, the last its copy as head: one weight, so each needs both gradients."""
        if self.tied is not None and self.tied.requires_grad:
            other = 0 if self.last else self.stages - 1
            arrived_vd = torch.empty_like(self.tied.grad)
            self.comm.peers.exchange([(self.tied.grad, other)], [(arrived_vd, other)])
            self.tied.grad += arrived_vd  # a + b here, b + a there: the copies stay the same to the last bit

    def share_loss(self) -> None:
        self.comm.broadcast(self.loss, source=self.stages - 1)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            yield "embedding.token.weight" if parameter is self.tied else name, parameter

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named_parameters()}

    def squared_norm(self) -> torch.Tensor:
        total = self.like.new_zeros(())
        for _, parameter in self.named_parameters():
            copy = parameter is self.tied and self.last  # the first stage counts it
            if parameter.grad is not None and not copy:
                total += parameter.grad.square().sum()
        self.comm.all_reduce(total)
        return total


class OneFOneB(GPipe):
    """The same messages and the same bubble in another order, so that few activations wait for their backward."""

    kind = "1f1b"


SCHEDULES = (GPipe.kind, OneFOneB.kind)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = training.flags(__doc__)
    parser.set_defaults(width=192, heads=12, layers=8, vocab=512, seq_len=64, batch_size=16, steps=6)
    parser.add_argument("--kind", choices=("ours", "library"), default="ours")
    parser.add_argument("--schedule", choices=SCHEDULES, default=OneFOneB.kind)
    parser.add_argument("--chunks", type=script.at_least(1), default=8, help="what a micro-batch is cut into")
    parser.add_argument("--untied", action="store_true", help="a head with a weight of its own")
    parser.add_argument("--timeout-s", type=script.positive, default=120, help="how long a message may take")
    args = parser.parse_args(argv)
    if args.chunks > args.batch_size:
        raise script.UserError(f"--chunks {args.chunks} of {args.batch_size} sequences; lower it or raise --batch-size")
    if args.steps < 2:
        raise script.UserError("--steps 1 leaves nothing to time, the first step is not; take 2 or more")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    shape = training.shape_of(args, tied=not args.untied)
    ours = args.kind == "ours"
    _, make = harness.resolve(f"{'pipeline' if ours else 'library'}-{args.schedule}")
    make.chunks = args.chunks
    run = script.start(__file__, args)
    with dist.session(args.device, timeout_s=args.timeout_s) as ctx:
        model = build(shape, seed=args.seed, device=str(ctx.device))
        if reason := make.why_not(model, ctx.world_size):
            raise script.UserError(f"{reason}, or raise --layers")
        if ctx.is_main and ctx.device.type == "cpu" and ctx.launch.local_world_size > script.usable_cores():
            get_logger().warning("more ranks than cores: stages wait for a core too, the bubble says nothing")
        text = training.Text(args, ctx.device)
        data = [text.step() for _ in range(args.steps)]
        alone = build(shape, seed=args.seed, device=str(ctx.device))
        wanted = training.one_process_losses(alone, args, ctx.device) if ctx.is_main else []
        del alone
        ctx.barrier("one process")

        comm = Comm(by_hand=True)
        strategy = make(model, comm, training.adamw(args.lr))
        formula = wire_bytes(model, data[0], ctx.world_size)
        del model  # with it the other stages' weights
        losses, timelines, step_ms = [], [], []
        for micro_batches in data:
            strategy.events, before = [], comm.total_sent_bytes()
            td.barrier()
            begin = time.perf_counter()
            loss = strategy.backward(micro_batches)
            strategy.update()
            losses.append(loss.item())  # waits for the GPU
            step_ms.append(1e3 * (time.perf_counter() - begin))
            sent = comm.total_sent_bytes() - before
            # Counted from the barrier: the clocks of two machines have nothing in common.
            timelines.append([e._replace(begin_s=e.begin_s - begin, end_s=e.end_s - begin) for e in strategy.events])
            run.log(step=len(losses), loss=losses[-1], step_ms=step_ms[-1])
        told = ctx.gather((timelines[1:], sent, strategy.peak_live))
        if not ctx.is_main:
            return {}
        by_step = zip(*(timelines for timelines, _, _ in told), strict=True)
        # The step that other work on this machine disturbed least. Into the library's schedules nobody looks from here.
        fastest = min(by_step, key=span_s) if ours else None
        result = {
            "world_size": ctx.world_size,
            "kind": args.kind,
            "schedule": args.schedule,
            "chunks": args.chunks,
            "bubble_measured": bubble(fastest) if fastest else None,
            "busy_ms_by_stage": [1e3 * busy_s(stage) for stage in fastest] if fastest else None,
            "nobody_computes_ms": 1e3 * nobody_s(fastest) if fastest else None,
            "bubble_formula": bubble_formula(ctx.world_size, args.chunks),
            "live_activations_first_stage": told[0][2] if ours else None,
            "wire_bytes_per_step": sum(sent for _, sent, _ in told) if ours else None,
            "wire_bytes_formula": formula,
            "step_ms": statistics.median(step_ms[1:]),
            "loss_last": losses[-1],
            "largest_loss_difference": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
        }
        report(result, [live for _, _, live in told])
        if fastest:
            draw(fastest, f"{args.schedule}: {bubble(fastest):.0%} of the time is idle", run.path("timeline.png"))
        return result


def report(result: dict, live: list[int]) -> None:
    print("{schedule} ({kind}): {world_size} stages, {chunks} chunks, {step_ms:.0f} ms a step".format(**result))
    print("  loss after the last step     {loss_last:.4f}".format(**result))
    print("  differs from one process by  {largest_loss_difference:.1e} at most".format(**result))
    if result["kind"] == "library":
        print("  bubble and bytes by formula  {bubble_formula:.3f}, {wire_bytes_formula:,}".format(**result))
        return
    print("  idle share of the stages     {bubble_measured:.3f}, formula {bubble_formula:.3f}".format(**result))
    busy = " ".join(f"{ms:.0f}" for ms in result["busy_ms_by_stage"])
    print("  busy ms, by stage           ", busy, "and for {nobody_computes_ms:.0f} ms none is".format(**result))
    print("  bytes sent in a step         {wire_bytes_per_step:,}, formula {wire_bytes_formula:,}".format(**result))
    print("  activations alive, by stage ", *live)
    stages, chunks = result["world_size"], result["chunks"]
    for kind in SCHEDULES:
        wanted = [peak_live(schedule(kind, stage, stages, chunks)) for stage in range(stages)]
        print(f"    as {kind:5} must have        ", *wanted)


if __name__ == "__main__":
    script.run(main)

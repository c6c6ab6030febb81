"""Full-shard, grad-shard, hybrid-shard and replicate, with and without recomputation: memory, bytes, time, equal loss.

You learn   what each strategy of FSDP pays and gets, by its FSDP2 and its FSDP1 name; which of memory, messages and
            compute activation checkpointing trades for which
Laptop      torchrun --standalone --nproc-per-node=4 ch04_fsdp/compare_strategies.py
Fewer       ... --strategies full,grad --recompute none,block,ops
GPU node    torchrun --standalone --nproc-per-node=gpu ch04_fsdp/compare_strategies.py --preset small --batch-size 8 \
                --seq-len 1024 --dtype bf16
Cluster     sbatch ch03_ddp/launch/train.sbatch ch04_fsdp/compare_strategies.py --preset 1b --dtype bf16
You see     one table. Held: grows with the copies of the model. Peak: what else was there. Sent: full gathers layers
            twice, grad once, replicate never. Equal losses prove that all did the same work.

Each visit builds the model anew. The first visits count memory and messages; later ones, in an order drawn anew in each
round, take the time. Hybrid: half of the ranks share a copy (on several nodes: those of a node).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch

from ch01_intro import training
from ch02_hardware_parallelism.training import timed_ms
from ch03_ddp.feed import Batch
from ch04_fsdp import fsdp1, model, recompute, resident, step
from ch04_fsdp.phases import MIB, MemoryLine, local_bytes
from ch04_fsdp.sharding import FSDP1_NAMES, STRATEGIES, Sharding
from ch04_fsdp.traffic import Collective, Traffic
from common import dist, lm, script
from common.logs import Progress

NAMES = {strategy: name for name, strategy in FSDP1_NAMES.items()}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # relative, of losses of the same work


@dataclass
class Row:
    """One combination. Bytes are this rank's, in the end the largest of all ranks'."""

    sharding: Sharding
    held: int = 0
    peak: int = 0
    seen: list[Collective] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norm: float = 0.0
    step_ms: list[float] = field(default_factory=list)

    @property
    def sent(self) -> float:
        return sum(c.sent_bytes for c in self.seen)

    def calls(self) -> str:
        """How many gathers, reduce-scatters and all-reduces a step."""
        count = Counter(c.kind for c in self.seen if c.phase != "update")
        return "+".join(str(count[kind]) for kind in ("all_gather", "reduce_scatter", "all_reduce"))


def visit(row: Row, args: argparse.Namespace, ctx: dist.Context, batch: Batch, *, timed: bool) -> None:
    """Build, warm up by a step, then measure one step (or time some), and forget the model."""
    gc.collect()
    line = MemoryLine(ctx.device)
    wrapped = model.build(args.preset, row.sharding, ctx, seq_len=args.seq_len, seed=args.seed)
    inner = model.inner(wrapped)
    optimizer = training.make_optimizer(inner, args.lr)
    count = batch[0].numel() * ctx.world_size

    def one_step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = step.backward(wrapped, [batch], count, ctx.world_size, row.sharding)
        return loss, step.update(wrapped, optimizer, 1.0)

    first, norm = one_step()
    if timed:
        row.step_ms += [timed_ms(one_step, ctx.device) for _ in range(args.steps)]
        return
    line.mark("first step")
    second, _ = one_step()
    line.mark("second step")
    with Traffic(inner) as traffic:  # a third: it is not to be measured while it is watched
        third, _ = one_step()
    losses = torch.stack([first, second, third])
    torch.distributed.all_reduce(losses)
    moments = (t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim())
    own = torch.tensor([
        2 * sum(local_bytes(p) for p in inner.parameters()) + sum(local_bytes(t) for t in moments),  # with gradients
        line.moments[-1].peak,
    ], device=ctx.device)  # fmt: skip
    torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.MAX)
    row.held, row.peak = (int(number) for number in own)
    row.seen, row.losses, row.norm = traffic.seen, losses.tolist(), norm.item()


def group_of(args: argparse.Namespace, ctx: dist.Context) -> int:
    """Ranks that share a copy under hybrid."""
    one_node = ctx.world_size == ctx.launch.local_world_size
    return args.shard_ranks or (max(1, ctx.world_size // 2) if one_node else ctx.launch.local_world_size)


def random_batch(args: argparse.Namespace, ctx: dist.Context) -> Batch:
    vocab = lm.config(args.preset, args.seq_len).vocab_size
    generator = torch.Generator().manual_seed(args.seed + ctx.rank)
    inputs, targets = torch.randint(vocab, (2, args.batch_size, args.seq_len), generator=generator).to(ctx.device)
    return inputs, targets


def measure(args: argparse.Namespace, ctx: dist.Context) -> list[Row]:
    dtype, group = training.DTYPES[args.dtype], group_of(args, ctx)
    rows = [
        Row(Sharding(strategy, group if strategy.startswith("hybrid") else None, dtype, again))
        for strategy, again in itertools.product(args.strategies, args.recompute)
    ]
    if any(row.sharding.is_hybrid for row in rows) and ctx.world_size % group:  # before the others take their time
        raise script.UserError(f"{ctx.world_size} ranks do not divide into groups of {group}; pass --shard-ranks")
    go, order = partial(visit, args=args, ctx=ctx, batch=random_batch(args, ctx)), random.Random(args.seed)
    progress = Progress((args.rounds + 1) * len(rows) + 1, "visits")
    resident.return_at_once()
    go(Row(rows[0].sharding), timed=False)  # what is made once a process: threads, connections, kernels
    for number, row in enumerate(rows):
        go(row, timed=False)
        progress.update(number + 2)
    resident.return_at_once(False)  # from here on the clock counts
    for number in range(args.rounds):
        for place, row in enumerate(order.sample(rows, len(rows))):
            go(row, timed=True)
            progress.update((number + 1) * len(rows) + place + 2)
    return rows


def show(rows: list[Row]) -> None:
    print(f"{'strategy':13}{'in FSDP1':21}{'recompute':>10}{'held MiB':>10}{'peak MiB':>10}{'calls':>10}"
          f"{'sent MiB':>10}{'step ms':>9}{'':>7}{'loss':>9}")  # fmt: skip
    first_ms = statistics.median(rows[0].step_ms)
    for row in rows:
        ms, sharding = statistics.median(row.step_ms), row.sharding
        print(f"{sharding.strategy:13}{NAMES[sharding.strategy]:21}{sharding.recompute:>10}{row.held / MIB:10.1f}"
              f"{row.peak / MIB:10.1f}{row.calls():>10}{row.sent / MIB:10.1f}{ms:9.1f}{ms / first_ms:6.2f}x"
              f"{row.losses[-1]:9.5f}")  # fmt: skip
    print(
        "held: parameters, gradients and moments of the rank that holds most; peak: of a whole step, real memory;\n"
        "calls: all_gather + reduce_scatter + all_reduce; sent: by each rank, if they are rings; loss: third step's"
    )


def explain(rows: list[Row]) -> None:
    """The same, as sentences, for the pairs that are there."""
    table = {(row.sharding.strategy, row.sharding.recompute): row for row in rows}
    pairs = [(("full", "none"), ("grad", "none"), "keeps weights from forward to backward"),
             (("full", "none"), ("hybrid", "none"), "gathers inside its group only"),
             (("full", "none"), ("replicate", "none"), "has no shards"),
             (("full", "none"), ("full", "block"), "computes each layer twice"),
             (("full", "none"), ("full", "ops"), "computes what is cheap twice")]  # fmt: skip
    for before, after, what in pairs:
        if before in table and after in table:
            a, b = table[before], table[after]
            slower = statistics.median(b.step_ms) / statistics.median(a.step_ms)
            label = after[0] if after[1] == "none" else f"recompute {after[1]}"
            print(f"{label} {what}: {(b.peak - a.peak) / MIB:+.1f} MiB peak, {(b.sent - a.sent) / MIB:+.1f} MiB sent, "
                  f"{slower:.2f} of full's time")  # fmt: skip


def against_fsdp1(args: argparse.Namespace, ctx: dist.Context, batch: Batch, group: int) -> dict:
    """Gradient norms of the first step under FSDP1's names and under FSDP2, in float32, from the same weights.

    They differ in the fifth digit: a float32 norm of half a million numbers has no more, and each adds up other parts.
    """
    count, found = batch[0].numel() * ctx.world_size, {}
    for name, strategy in FSDP1_NAMES.items():
        ranks = group if strategy.startswith("hybrid") else None
        if strategy in args.strategies and ranks != 1:  # groups of one rank: see the trap in fsdp1.py
            old = fsdp1.grad_norm(args.preset, name, ctx, [batch], count, shard_ranks=ranks, seed=args.seed)
            sharding = Sharding(strategy, ranks)
            wrapped = model.build(args.preset, sharding, ctx, seq_len=args.seq_len, seed=args.seed)
            step.backward(wrapped, [batch], count, ctx.world_size, sharding)
            found[name] = old, step.clip(wrapped, 1e9).item()
    if ctx.is_main:
        print(f"\n{'gradient norm':21}{'FSDP1':>12}{'FSDP2':>12}")
        for name, (old, new) in found.items():
            print(f"{name:21}{old:12.6f}{new:12.6f}  {FSDP1_NAMES[name]}")
    largest = max((abs(old - new) / new for old, new in found.values()), default=0.0)
    return {"fsdp1_compared": len(found), "fsdp1_largest_norm_difference": largest}


def parse(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument("--strategies", type=script.comma_list(str), default=list(STRATEGIES), help=", ".join(STRATEGIES))
    made.add_argument("--recompute", type=script.comma_list(str), default=["none", "block", "ops"],
                      help=", ".join(recompute.CHOICES))  # fmt: skip
    made.add_argument("--shard-ranks", type=script.at_least(1), help="hybrid: ranks that share a copy")
    made.add_argument("--rounds", type=script.at_least(1), default=2, help="of timed visits")
    made.add_argument("--steps", type=script.at_least(1), default=2, help="timed in each visit")
    made.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    made.add_argument("--batch-size", type=script.at_least(1), default=2, help="sequences a rank")
    made.add_argument("--seq-len", type=script.at_least(2), default=128)
    made.add_argument("--lr", type=script.positive, default=1e-3)
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = made.parse_args(argv)
    for strategy in args.strategies:
        Sharding(strategy)
    for choice in args.recompute:
        recompute.check(choice)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    script.start(__file__, args)
    with dist.session(args.device) as ctx:
        rows = measure(args, ctx)
        if ctx.is_main:
            show(rows)
            explain(rows)
        result: dict = {"world_size": ctx.world_size, "combinations": len(rows)}
        for row in rows:
            name = f"{row.sharding.strategy}_{row.sharding.recompute}".replace("-", "_")
            result |= {f"{name}_held_mib": row.held / MIB, f"{name}_peak_mib": row.peak / MIB,
                       f"{name}_sent_mib": row.sent / MIB, f"{name}_collectives": len(row.seen),
                       f"{name}_step_ms": statistics.median(row.step_ms)}  # fmt: skip
        result["largest_loss_difference"] = max(
            abs(a - b) / a for row in rows for a, b in zip(rows[0].losses, row.losses, strict=True)
        )
        result["loss_drop"] = rows[0].losses[0] - rows[0].losses[-1]
        result |= against_fsdp1(args, ctx, random_batch(args, ctx), group_of(args, ctx))
        if not result["largest_loss_difference"] <= TOLERANCE[rows[0].sharding.dtype]:
            raise script.CheckFailed("the losses differ: this is not the same work", result)
        if not result["fsdp1_largest_norm_difference"] <= 1e-4:
            raise script.CheckFailed("FSDP1's gradients are not FSDP2's", result)
        return result


if __name__ == "__main__":
    script.run(main)

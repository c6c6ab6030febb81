"""Shard inside the host, replicate across: the bytes on the thin link between two hosts, counted and by formula.

You learn   which collectives of which strategy cross the network, why hybrid sharding exists, and how to count it
Laptop      python ch04_fsdp/hybrid_on_two_hosts.py                 (two virtual hosts of two ranks, at 200mbit)
More        ... --strategies full,grad,hybrid,hybrid-grad,replicate --rates 100mbit,1gbit
Cluster     sbatch ch03_ddp/launch/train.sbatch ch04_fsdp/hybrid_on_two_hosts.py --preset 1b --dtype bf16
            (step times and the formula; a virtual host's card counts, a real one's has others' traffic too)
You see     full-shard sends the layers' weights through the link twice and all gradients once; hybrid sends each
            rank's shard of the gradients, and keeps the rest inside the host. The same losses, a shorter step.

The counter is the interface's own (eth0 of each host: frames, headers, acknowledgements). Ranks of one host talk over
its loopback interface, which is counted too. gloo's reduce-scatter is an all-reduce underneath, twice the bytes: the
formula is given for it and for NCCL, which has a real one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ch01_intro import training
from ch02_hardware_parallelism import virtual_cluster
from ch02_hardware_parallelism.rates import as_flags, at_rates, check_ranks, rate
from ch02_hardware_parallelism.training import WARM_UP, timed_ms
from ch04_fsdp import model, step
from ch04_fsdp.phases import MIB
from ch04_fsdp.sharding import STRATEGIES, Sharding
from ch04_fsdp.traffic import Collective, Traffic
from common import dist, lm, script

HOSTS, RANKS = 2, 2
FLAGS = ("preset", "steps", "batch_size", "seq_len", "lr", "dtype", "seed", "device")


def loopback_bytes() -> int:
    """Bytes that this host's loopback interface has carried."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    counters = next(line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:"))
    return int(counters[8])


def crossing_bytes(seen: Sequence[Collective], world_size: int, ranks_a_host: int, *, gloo: bool) -> float:
    """What each host sends to others in a step, by formula. Ranks of a host are neighbours in every ring.

    A ring over all ranks leaves each host once: what its last rank sends. A ring over one rank of each host leaves it
    with every rank's. A ring inside does not leave.
    """
    total = 0.0
    for one in seen:
        if one.ranks == world_size:
            leaves = 1
        elif one.kind == "all_reduce" and one.phase == "backward":  # hybrid's, between the copies
            leaves = ranks_a_host
        else:
            leaves = 0
        total += leaves * one.sent_bytes * (2 if gloo and one.kind == "reduce_scatter" else 1)
    return total


@dataclass
class Trained:
    """A model under a strategy, and what each of its steps cost."""

    sharding: Sharding
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    step_ms: list[float] = field(default_factory=list)
    card: list[int] = field(default_factory=list)
    loopback: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seen: list[Collective] = field(default_factory=list)


def make(strategy: str, args: argparse.Namespace, ctx: dist.Context) -> Trained:
    sharding = Sharding(strategy, dtype=training.DTYPES[args.dtype])  # hybrid: the ranks of a node share a copy
    wrapped = model.build(args.preset, sharding, ctx, seq_len=args.seq_len, seed=args.seed)
    return Trained(sharding, wrapped, training.make_optimizer(model.inner(wrapped), args.lr))


def train(args: argparse.Namespace, ctx: dist.Context) -> dict[str, Trained]:
    """The same steps with every strategy, in turn, so that all meet the same machine."""
    trainings = {strategy: make(strategy, args, ctx) for strategy in args.strategies}
    vocab = lm.config(args.preset, args.seq_len).vocab_size
    generator = torch.Generator().manual_seed(args.seed + ctx.rank)
    counts = virtual_cluster.described() is not None
    for number in range(WARM_UP + args.steps):
        tokens = torch.randint(vocab, (2, args.batch_size, args.seq_len), generator=generator).to(ctx.device)
        for one in trainings.values():
            losses: list[torch.Tensor] = []

            def step_once(one: Trained = one, batch: torch.Tensor = tokens, losses: list = losses) -> None:
                count = batch[0].numel() * ctx.world_size
                losses.append(step.backward(one.wrapped, [(batch[0], batch[1])], count, ctx.world_size, one.sharding))
                step.update(one.wrapped, one.optimizer, 1.0)

            ctx.barrier("before")  # all that was sent before has left
            before = (virtual_cluster.nic_bytes()[0], loopback_bytes()) if counts else (0, 0)
            if number == 1:
                with Traffic(model.inner(one.wrapped)) as traffic:
                    step_once()
                one.seen = traffic.seen
            else:
                one.step_ms.append(timed_ms(step_once, ctx.device))
            ctx.barrier("after")
            after = (virtual_cluster.nic_bytes()[0], loopback_bytes()) if counts else (0, 0)
            one.card.append(after[0] - before[0])
            one.loopback.append(after[1] - before[1])
            torch.distributed.all_reduce(losses[0])
            one.losses.append(losses[0].item())
    return trainings


def measure(args: argparse.Namespace, ctx: dist.Context) -> dict:
    trainings, rows = train(args, ctx), {}
    ranks_a_host = ctx.launch.local_world_size
    first = next(iter(trainings.values()))
    for strategy, one in trainings.items():
        own = [statistics.median(counts[WARM_UP:]) for counts in (one.card, one.loopback)]
        by_rank = torch.tensor(own, dtype=torch.float64, device=ctx.device)
        torch.distributed.all_reduce(by_rank, op=torch.distributed.ReduceOp.MAX)  # the host that sent most
        card, loopback = by_rank.tolist()
        formula = crossing_bytes(one.seen, ctx.world_size, ranks_a_host, gloo=ctx.device.type == "cpu")
        apart = [abs(a - b) / abs(a) for a, b in zip(first.losses, one.losses, strict=True)]
        rows[strategy] = {
            "card_mib": card / MIB if card else None,
            "formula_mib": formula / MIB,
            "nccl_mib": crossing_bytes(one.seen, ctx.world_size, ranks_a_host, gloo=False) / MIB,
            "loopback_mib": loopback / MIB if loopback else None,
            "step_ms": statistics.median(one.step_ms[1:]),
            "loss": one.losses[-1],
            "loss_difference": max(apart),
        }
    return {
        "world_size": ctx.world_size,
        "hosts": ctx.world_size // ranks_a_host,
        "rows": rows,
        "largest_loss_difference": max(row["loss_difference"] for row in rows.values()),
        **{f"{name.replace('-', '_')}_{key}": value for name, row in rows.items() for key, value in row.items()
           if key not in ("loss", "loss_difference")},
    }  # fmt: skip


def show(result: dict) -> None:
    print(f"{'MiB a step that each':22}{'link of a host':>24}{'with NCCL':>14}{'inside it':>14}{'':>12}\n"
          f"{'host sends, over the':22}{'counted':>14}{'formula':>10}{'formula':>14}{'counted':>14}{'step ms':>12}"
          f"{'last loss':>12}")  # fmt: skip
    for strategy, row in result["rows"].items():
        card, loopback = (f"{row[k]:.2f}" if row[k] else "-" for k in ("card_mib", "loopback_mib"))
        print(f"{strategy:22}{card:>14}{row['formula_mib']:10.2f}{row['nccl_mib']:14.2f}{loopback:>14}"
              f"{row['step_ms']:12.1f}{row['loss']:12.5f}", flush=True)  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument(
        "--strategies", type=script.comma_list(str), default=["full", "hybrid"], help=", ".join(STRATEGIES)
    )
    made.add_argument("--rates", type=script.comma_list(rate), help="of the hosts' links (default: 200mbit)")
    made.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    made.add_argument("--steps", type=script.at_least(1), default=6, help="that are timed, of each strategy")
    made.add_argument("--batch-size", type=script.at_least(1), default=2, help="sequences a rank")
    made.add_argument("--seq-len", type=script.at_least(2), default=64)
    made.add_argument("--lr", type=script.positive, default=1e-3)
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = made.parse_args(argv)
    for strategy in args.strategies:
        Sharding(strategy)
    if args.rates is None and dist.read_launch().world_size == 1:
        args.rates = ["200mbit"]
    check_ranks(args.rates)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    run = script.start(__file__, args)
    if args.rates:
        flags = [*as_flags(args, *FLAGS), "--strategies", ",".join(args.strategies)]
        found = at_rates(__file__, flags, args.rates, run, hosts=HOSTS, ranks=RANKS)
        result = {key: next(iter(found.values()))[key] for key in ("world_size", "hosts")}
        result["largest_loss_difference"] = max(row["largest_loss_difference"] for row in found.values())
        skip = (*result, "rows")
        return result | {f"{k}_{at}": v for at, row in found.items() for k, v in row.items() if k not in skip}
    launch = dist.read_launch()
    if launch.world_size == launch.local_world_size:
        raise script.UserError("all ranks are on one host, and no link is thin; use plain python, or several nodes")
    with dist.session(args.device) as ctx:
        result = measure(args, ctx)
        if ctx.is_main:
            show(result)
        return result


if __name__ == "__main__":
    script.run(main)

"""What each rank holds of a sharded model, and what it sends for it: rows, padding, bytes, collectives.

You learn   that a shard is a block of rows of every tensor, who gets fewer rows and what that costs, when a layer's
            weights travel and when its gradients do, and what each strategy saves and pays
Laptop      torchrun --standalone --nproc-per-node=4 ch04_fsdp/inspect_shards.py --strategy full
Hybrid      torchrun --standalone --nproc-per-node=4 ch04_fsdp/inspect_shards.py --strategy hybrid --shard-ranks 2
No ranks    python ch04_fsdp/inspect_shards.py --plan 64 --ranks-a-node 8 --preset 8b --strategy hybrid --dtype bf16
GPU node    torchrun --standalone --nproc-per-node=gpu ch04_fsdp/inspect_shards.py --preset 1b --dtype bf16
Cluster     sbatch ch03_ddp/launch/train.sbatch ch04_fsdp/inspect_shards.py --preset 8b --strategy hybrid --dtype bf16
You see     one table of rows, one of bytes, one of collectives; the rule that they follow, and that the live model
            follows it. --plan prints the same from shapes alone, for a cluster that you do not have.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ch01_intro import training
from ch04_fsdp import model, step, weights
from ch04_fsdp.phases import local_bytes
from ch04_fsdp.sharding import STRATEGIES, Sharding
from ch04_fsdp.traffic import ROOT, Collective, Traffic, Units, expected, padded, rows_of, unit_parameters
from common import dist, lm, script

MIB = 2**20
STATE = 4  # times the parameters: they, their gradients and Adam's two moments, all of float32


def mesh_shape(sharding: Sharding, world_size: int, ranks_a_node: int) -> tuple[int, int]:
    """Copies of the model, and ranks that share one. As Sharding.mesh, which has checked that they divide."""
    if sharding.strategy == "replicate":
        return 1, world_size  # no rows are dealt, and all ranks reduce
    group = (sharding.shard_ranks or ranks_a_node) if sharding.is_hybrid else world_size
    if world_size % group:
        raise script.UserError(f"{world_size} ranks do not divide into groups of {group}; take another --shard-ranks")
    return world_size // group, group


def alike(units: Units) -> list[tuple[str, list[str]]]:
    """Units by what they look like: the name of the first, and the names of all that have the same shapes."""
    groups: dict[tuple, list[str]] = {}
    for name, parameters in units.items():
        groups.setdefault(tuple(p.shape for p in parameters), []).append(name)
    return [(names[0], names) for names in groups.values()]


def show_rows(whole: nn.Module, units: Units, ranks: int) -> None:
    """Which rows of which tensor each rank of a group holds."""
    names = {id(p): name for name, p in whole.named_parameters()}
    shown = [*range(min(ranks, 3)), *([ranks - 1] if ranks > 3 else [])]
    print(f"{'rows of':44}{'shape':>16}{'padding':>9}  " + "".join(f"{f'rank {rank}':>14}" for rank in shown))
    for first, same in alike(units):
        print(first + (f" and {len(same) - 1} more like it" if len(same) > 1 else ""))
        for parameter in units[first]:
            rows, name = parameter.shape[0], names[id(parameter)].removeprefix("model.").removeprefix(f"{first}.")
            blocks = [rows_of(rank, rows, ranks) for rank in shown]
            filled = padded(parameter, ranks) // (parameter.numel() // rows) - rows
            cells = "".join(f"{f'{b.start}-{b.stop - 1}' if b else 'none':>14}" for b in blocks)
            print(f"  {name:42}{list(parameter.shape)!s:>16}{filled or '-':>9}  {cells}")


def held_numbers(units: Units, ranks: int) -> list[int]:
    """Parameters that each rank of a group holds, by the rule."""
    parameters = [p for own in units.values() for p in own]
    return [
        sum(len(rows_of(rank, p.shape[0], ranks)) * (p.numel() // p.shape[0]) for p in parameters)
        for rank in range(ranks)
    ]


def show_held(held: Sequence[int], total: int, ranks: int) -> None:
    print(f"\n{'MiB held':16}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'sum':>12}{'of the ideal':>14}")
    for numbers in sorted(set(held), reverse=True):
        who = [str(rank) for rank, own in enumerate(held) if own == numbers]
        label = "every rank" if len(who) == ranks else "rank " + ", ".join(who[:3]) + " ..." * (len(who) > 3)
        mib = numbers * 4 / MIB
        print(f"{label:16}{mib:12.2f}{mib:12.2f}{2 * mib:12.2f}{STATE * mib:12.2f}{numbers * ranks / total:14.4f}")


def show_collectives(seen: Sequence[Collective], units: Units) -> None:
    """One layer's, then the whole step's."""
    last_layer = next((name for name in reversed(units) if name.startswith("layers.")), ROOT)
    for title, chosen in ((f"of {last_layer}", [c for c in seen if c.unit == last_layer]), ("of the step", seen)):
        print(f"\n{f'collectives {title}':28}{'phase':>10}{'number':>8}{'ranks':>7}{'MiB whole':>11}{'MiB sent':>10}")
        for key, number in Counter((c.kind, c.phase, c.ranks) for c in chosen).items():
            same = [c for c in chosen if (c.kind, c.phase, c.ranks) == key]
            whole, sent = sum(c.whole_bytes for c in same) / MIB, sum(c.sent_bytes for c in same) / MIB
            print(f"{key[0]:28}{key[1]:>10}{number:8}{key[2]:7}{whole:11.2f}{sent:10.2f}")


def follows_the_rule(inner: nn.Module, group_rank: int, ranks: int) -> bool:
    """Whether this rank holds just the rows that it should."""
    for parameter in inner.parameters():
        if isinstance(parameter, DTensor):
            own, rows = weights._own(parameter)
            should = rows_of(group_rank, parameter.shape[0], ranks)
            if len(own) != len(should) or (should and rows.start != should.start):
                return False
    return True


@dataclass(frozen=True)
class Live:
    """What a model of this rank's holds and sends. held: bytes of parameters, gradients and moments."""

    ruled: bool
    held: int
    seen: list[Collective]


def look(args: argparse.Namespace, sharding: Sharding, ctx: dist.Context, shards: int) -> Live:
    """Two steps on random tokens, and the second one's collectives: in its first DDP asks about its buckets."""
    wrapped = model.build(args.preset, sharding, ctx, seq_len=args.seq_len, seed=args.seed)
    inner = model.inner(wrapped)
    optimizer = training.make_optimizer(inner, 1e-3)
    tokens = torch.randint(inner.config.vocab_size, (args.batch_size, args.seq_len), device=ctx.device)
    batches = [(tokens, tokens)] * args.accumulation
    count = tokens.numel() * args.accumulation * ctx.world_size
    for _ in range(2):
        with Traffic(inner) as traffic:
            step.backward(wrapped, batches, count, ctx.world_size, sharding, sync_each=args.sync_each)
            held = sum(model.held_bytes(inner).values())
            step.update(wrapped, optimizer, 1.0)
    moments = (t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim())
    held += sum(local_bytes(t) for t in moments)
    return Live(follows_the_rule(inner, ctx.rank % shards, shards), held, traffic.seen)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    script.start(__file__, args)
    sharding = Sharding(args.strategy, args.shard_ranks, training.DTYPES[args.dtype])
    whole = weights.plan(lm.config(args.preset, args.seq_len))
    if args.plan:
        shape = mesh_shape(sharding, args.plan, args.ranks_a_node or args.plan)
        wanted, result = by_rule(args, sharding, whole, args.plan, shape)
        report(args, sharding, whole, args.plan, shape, wanted)
        return result
    with dist.session(args.device) as ctx:
        shape = mesh_shape(sharding, ctx.world_size, ctx.launch.local_world_size)
        wanted, result = by_rule(args, sharding, whole, ctx.world_size, shape)
        live = look(args, sharding, ctx, shape[1])
        if sharding.strategy == "replicate":
            same = total_of(live.seen) == total_of(wanted)
        else:
            same = Counter(live.seen) == Counter(wanted)
        all_live = ctx.exchange("live", json.dumps([live.ruled, same, live.held]))
        ruled, same, held = (list(column) for column in zip(*map(json.loads, all_live), strict=True))
        result |= {
            "rows_as_by_rule": all(ruled),
            "collectives_as_by_rule": all(same),
            "held_mib_live": max(held) / MIB,
            "collectives": len(live.seen),
        }
        if ctx.is_main:
            report(args, sharding, whole, ctx.world_size, shape, live.seen)
            print(f"\nthe live model holds the rows of the rule: {all(ruled)}; makes its collectives: {all(same)}")
        if not all(ruled + same):
            raise script.CheckFailed("the live model does not follow the rule that is printed", result)
        return result


def by_rule(
    args: argparse.Namespace, sharding: Sharding, whole: nn.Module, world_size: int, shape: tuple[int, int]
) -> tuple[list[Collective], dict]:
    """The collectives of a step, and what RESULT says of them and of the shards, from shapes alone."""
    units, shards = unit_parameters(whole), shards_of(sharding, shape)
    held, total = held_numbers(units, shards), sum(p.numel() for p in whole.parameters())
    wanted = expected(
        units, sharding, replicas=shape[0], ranks=shape[1], micro_batches=args.accumulation, sync_each=args.sync_each
    )
    return wanted, {
        "world_size": world_size,
        "copies": world_size // shards,
        "shards": shards,
        "held_mib": STATE * 4 * max(held) / MIB,
        "held_share_of_ideal": max(held) * shards / total,
        "padding_mib": sum(padded(p, shards) - p.numel() for own in units.values() for p in own) * 4 / MIB,
        "collectives": len(wanted),
        "sent_mib": sum(c.sent_bytes for c in wanted) / MIB,
    }


def report(
    args: argparse.Namespace,
    sharding: Sharding,
    whole: nn.Module,
    world_size: int,
    shape: tuple[int, int],
    seen: Sequence[Collective],
) -> None:
    units, shards = unit_parameters(whole), shards_of(sharding, shape)
    print(f"{args.preset}, {sharding.strategy} on {world_size} ranks: copies {world_size // shards}, shards of each "
          f"{shards}; weights travel as {args.dtype}\n")  # fmt: skip
    show_rows(whole, units, shards)
    show_held(held_numbers(units, shards), sum(p.numel() for p in whole.parameters()), shards)
    show_collectives(seen, units)


def shards_of(sharding: Sharding, shape: tuple[int, int]) -> int:
    """Ranks that the rows of a copy are dealt to."""
    return 1 if sharding.strategy == "replicate" else shape[1]


def total_of(seen: Sequence[Collective]) -> int:
    """Bytes of gradients, however they are put into buckets."""
    return sum(c.whole_bytes for c in seen if c.phase == "backward")


def parse(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    made.add_argument("--strategy", choices=STRATEGIES, default="full")
    made.add_argument("--shard-ranks", type=script.at_least(1), help="hybrid: ranks that share a copy")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the gathered weights")
    made.add_argument("--accumulation", type=script.at_least(1), default=1, help="micro-batches a step")
    made.add_argument("--sync-each", action="store_true", help="reduce the gradients after each of them")
    made.add_argument("--batch-size", type=script.at_least(1), default=1)
    made.add_argument("--seq-len", type=script.at_least(2), default=32)
    made.add_argument("--plan", type=script.at_least(2), metavar="RANKS", help="start none: what these would hold")
    made.add_argument("--ranks-a-node", type=script.at_least(1), help="hybrid's group without --shard-ranks")
    args = made.parse_args(argv)
    Sharding(args.strategy, args.shard_ranks)  # a contradiction is found before anything is started
    if args.ranks_a_node and not args.plan:
        raise script.UserError("--ranks-a-node belongs to --plan: live ranks know their nodes; leave it out")
    if args.plan and dist.read_launch().world_size > 1:
        raise script.UserError("--plan needs no ranks; start it with plain python, or leave --plan out")
    return args


if __name__ == "__main__":
    script.run(main)

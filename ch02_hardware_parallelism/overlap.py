"""How much communication is hidden behind compute? One number for each way of data parallelism, on each link.

You learn   to split a step into compute, communication and what of it shows; when buckets bring much, and when nothing
Laptop      python ch02_hardware_parallelism/overlap.py --rates 200mbit,1gbit,5gbit        (hosts of a virtual cluster)
Loopback    torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/overlap.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/overlap.py --width 1024 --layers 12
Cluster     srun python ch02_hardware_parallelism/overlap.py --width 1024 --layers 12
You see     naive hides nothing. Buckets hide what fits beside backward: most on a fast link, a part on a slow one,
            where the step is as long as its messages. Ours against DDP's, step by step in one run.

Every way has its own two parts: compute is its step when the messages are not sent, communication its messages without
the step. exposed = step - compute, the median over rounds; hidden = 1 - exposed / communication. It is below 0 where
sending slows computing down, as when gloo's threads need the cores of a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

from ch02_hardware_parallelism.comm import Comm, Done, Handle
from ch02_hardware_parallelism.data_parallel import BucketedDataParallel, DataParallel
from ch02_hardware_parallelism.library_data import LibraryDDP
from ch02_hardware_parallelism.model import build
from ch02_hardware_parallelism.rates import add_rates, as_flags, at_rates, check_ranks
from ch02_hardware_parallelism.strategy import Strategy
from ch02_hardware_parallelism.training import (
    SHARED_FLAGS,
    WARM_UP,
    Text,
    adamw,
    flags,
    shape_of,
    timed_ms,
    train_step,
)
from ch02_hardware_parallelism.zero1 import Zero1
from common import dist, script

KINDS: dict[str, type[Strategy]] = {
    "naive": DataParallel, "buckets": BucketedDataParallel, "ddp": LibraryDDP, "zero1": Zero1,
}  # fmt: skip
Message = tuple[str, torch.Tensor, bool]  # the collective, what goes in, whether the step goes on meanwhile


@dataclass
class Silent(Comm):
    """Sends nothing and notes what it was given: what is left of a step is compute.

    The ranks' weights drift apart, but each rank's stay those of a training.
    """

    noted: list[tuple[str, int, bool]] = field(default_factory=list)
    gathered: torch.Tensor | None = None

    def all_reduce(self, x: torch.Tensor, *, async_op: bool = False) -> Handle:
        self.noted.append(("all_reduce", x.numel(), async_op))
        return Done()

    def reduce_scatter(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        self.noted.append(("reduce_scatter", x.numel(), False))
        return x.chunk(self.size, dim)[self.rank]

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """What the first call got, which was a real one: made-up weights could overflow."""
        self.noted.append(("all_gather", x.numel(), False))
        if self.gathered is None:
            self.gathered = super().all_gather(x, dim)
        return self.gathered

    def ddp_bucket(self, bucket):  # no annotations: DDP checks them, and would find strings
        """In place of DDP's own all_reduce of a bucket, which no Comm sees. It divides first, and so does this."""
        self.all_reduce(bucket.buffer().div_(self.size), async_op=True)
        return noop_hook(None, bucket)


def silent_twin(make: Callable[[Comm], Strategy], text: Text) -> tuple[Strategy, list[Message]]:
    """The strategy without its messages, and the messages of a step, of zeros."""
    comm = Silent()
    twin = make(comm)
    if isinstance(twin, LibraryDDP):
        twin.ddp.register_comm_hook(comm, Silent.ddp_bucket)
    for _ in range(WARM_UP):
        comm.noted.clear()
        train_step(twin, text.step())
    return twin, [(name, torch.zeros(numbers, device=text.device), later) for name, numbers, later in comm.noted]


def send(messages: list[Message], comm: Comm) -> None:
    """The communication of a step: what backward would not wait for goes out at once."""
    under_way: list[Handle] = []
    for collective, x, async_op in messages:
        if async_op:
            under_way.append(comm.all_reduce(x, async_op=True))
            continue
        while under_way:
            under_way.pop(0).wait()
        getattr(comm, collective)(x)


def measure(args: argparse.Namespace, ctx: dist.Context) -> dict:
    """Medians of interleaved steps, in ms: each kind in turn, so that all see the same machine."""
    text, comm = Text(args, ctx.device), Comm()
    BucketedDataParallel.bucket_bytes = int(args.bucket_mib * 2**20)
    LibraryDDP.bucket_mib = args.bucket_mib

    def make(kind: type[Strategy], comm: Comm) -> Strategy:
        return kind(build(shape_of(args), seed=args.seed, device=str(ctx.device)), comm, adamw(args.lr))

    strategies = {name: make(kind, comm) for name, kind in KINDS.items()}
    twins = {name: silent_twin(partial(make, kind), text) for name, kind in KINDS.items()}
    rows: dict[str, list[float]] = {}
    for number in range(args.steps + WARM_UP):
        batches = text.step()
        actions: dict[str, Callable[[], object]] = {
            **{f"{name}_ms": partial(train_step, strategy, batches) for name, strategy in strategies.items()},
            **{f"{name}_compute_ms": partial(train_step, twin, batches) for name, (twin, _) in twins.items()},
            **{f"{name}_communication_ms": partial(send, messages, comm) for name, (_, messages) in twins.items()},
        }
        names, first = list(actions), number % len(actions)
        for name in names[first:] + names[:first]:  # none always comes behind the same other
            rows.setdefault(name, []).append(timed_ms(actions[name], ctx.device))
    timed = {name: times[WARM_UP:] for name, times in rows.items()}
    result: dict = {"world_size": ctx.world_size, "backend": "nccl" if ctx.device.type == "cuda" else "gloo"}
    result |= {name: statistics.median(times) for name, times in timed.items()}
    tokens = args.batch_size * args.accumulation * args.seq_len
    for name in KINDS:
        of_a_round = zip(timed[f"{name}_ms"], timed[f"{name}_compute_ms"], strict=True)  # they met the same machine
        exposed = statistics.median(step - compute for step, compute in of_a_round)
        result |= {
            f"{name}_exposed_ms": exposed,
            f"{name}_hidden": 1 - exposed / result[f"{name}_communication_ms"],
            f"{name}_tokens_per_s": tokens / result[f"{name}_ms"] * 1e3,
        }
    ratios = [d / b for d, b in zip(timed["ddp_ms"], timed["buckets_ms"], strict=True)]
    result["buckets_over_ddp"] = statistics.median(ratios)  # of tokens/s, so of the inverse times
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return result | {"buckets_over_ddp_p25": quartiles[0], "buckets_over_ddp_p75": quartiles[2]}


def show(result: dict) -> None:
    print(f"{'ms':10}{'compute':>9}{'communication':>15}{'step':>9}{'exposed':>9}{'hidden':>9}{'tokens/s':>11}")
    for name in KINDS:
        compute, communication, step, exposed = (
            result[f"{name}_{part}ms"] for part in ("compute_", "communication_", "", "exposed_")
        )
        hidden, rate = result[f"{name}_hidden"], result[f"{name}_tokens_per_s"]
        print(f"{name:10}{compute:9.1f}{communication:15.1f}{step:9.1f}{exposed:9.1f}{hidden:9.0%}{rate:11,.0f}")
    low, high = result["buckets_over_ddp_p25"], result["buckets_over_ddp_p75"]
    print(f"tokens/s of our buckets over DDP's: {result['buckets_over_ddp']:.3f} (quartiles {low:.3f} to {high:.3f})")


def draw(found: dict[str, dict], run: script.Run) -> None:
    """One bar for each kind and link: compute, and what of the communication shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.6), layout="constrained", squeeze=False)
    for axes, (rate, row) in zip(grid.flat, found.items(), strict=True):
        names = list(KINDS)
        compute, exposed = ([row[f"{name}_{part}_ms"] for name in names] for part in ("compute", "exposed"))
        axes.bar(names, compute, color="#1f5c99", label="compute")
        bars = axes.bar(names, exposed, bottom=compute, color="#b3541e", label="communication that shows")
        axes.bar_label(bars, [f"{row[f'{name}_hidden']:.0%}\nhidden" for name in names], fontsize=8, padding=2)
        axes.set(title=rate, ylabel="ms a step")
        axes.margins(y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(run.path("overlap.png"), dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = flags(__doc__)
    parser.add_argument("--bucket-mib", type=script.positive, default=1, help="of our buckets and of DDP's")
    add_rates(parser)
    args = parser.parse_args(argv)
    shape_of(args)
    check_ranks(args.rates)
    run = script.start(__file__, args)
    if args.rates:
        found = at_rates(__file__, as_flags(args, *SHARED_FLAGS, "bucket_mib"), args.rates, run)
        draw(found, run)
        kept = [f"{name}_{part}" for name in KINDS for part in ("ms", "compute_ms", "communication_ms", "hidden")]
        kept += [f"buckets_over_ddp{part}" for part in ("", "_p25", "_p75")]
        over_ddp = statistics.mean(row["buckets_over_ddp"] for row in found.values())
        print(f"over DDP's, all links: {over_ddp:.3f}")
        result = {"world_size": 2, "buckets_over_ddp": over_ddp}
        return result | {f"{key}_{rate}": row[key] for rate, row in found.items() for key in kept}
    with dist.session(args.device) as ctx:
        result = measure(args, ctx)
        if ctx.is_main:
            show(result)
            draw({"this network": result}, run)
        return result


if __name__ == "__main__":
    script.run(main)

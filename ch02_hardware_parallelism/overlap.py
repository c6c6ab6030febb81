"""How much communication is hidden behind compute? One number for each way of data parallelism, on each link.

You learn   to split a step into compute, communication and what of it shows; when buckets bring much, and when nothing
Laptop      python ch02_hardware_parallelism/overlap.py --rates 200mbit,1gbit,5gbit        (hosts of a virtual cluster)
Loopback    torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/overlap.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/overlap.py --width 1024 --layers 12
Cluster     srun python ch02_hardware_parallelism/overlap.py --width 1024 --layers 12
You see     naive hides nothing. Buckets hide what fits beside backward: most on a fast link, a part on a slow one,
            where the step is as long as its messages. Ours against DDP's, step by step in one run.

compute is a step in which the collectives do nothing; communication is the collectives alone, without any compute;
exposed = step - compute; hidden = 1 - exposed / communication.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as td

from ch02_hardware_parallelism.comm import Comm, Done, Handle
from ch02_hardware_parallelism.data_parallel import BucketedDataParallel, DataParallel
from ch02_hardware_parallelism.library_data import LibraryDDP
from ch02_hardware_parallelism.model import build
from ch02_hardware_parallelism.rates import as_flags, at_rates
from ch02_hardware_parallelism.strategy import Batch, Strategy
from ch02_hardware_parallelism.training import SHARED_FLAGS, Text, adamw, flags, shape_of
from ch02_hardware_parallelism.zero1 import Zero1
from common import dist, script

WARM_UP = 2
KINDS: dict[str, type[Strategy]] = {
    "naive": DataParallel, "buckets": BucketedDataParallel, "ddp": LibraryDDP, "zero1": Zero1,
}  # fmt: skip


class Silent(Comm):
    """A communicator that says nothing: what is left of a step is compute."""

    def all_reduce(self, x: torch.Tensor, *, async_op: bool = False) -> Handle:
        return Done()


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed_ms(action: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until all ranks are done, begun together."""
    td.barrier()
    settle(device)
    begin = time.perf_counter()
    action()
    settle(device)
    took = torch.tensor((time.perf_counter() - begin) * 1e3, device=device)
    td.all_reduce(took, op=td.ReduceOp.MAX)
    return took.item()


def train_step(strategy: Strategy, batches: list[Batch]) -> None:
    strategy.backward(batches)
    strategy.update()


def messages_of(strategy: BucketedDataParallel) -> None:
    """The communication of a step without its compute: every bucket at once, as fast as the link takes them."""
    handles = [strategy.comm.all_reduce(torch.empty_like(b.flat), async_op=True) for b in strategy.buckets]
    for handle in handles:
        handle.wait()


def measure(args: argparse.Namespace, ctx: dist.Context) -> dict:
    """Medians of interleaved steps, in ms: each kind in turn, so that all see the same machine."""
    text = Text(args, ctx.device)
    BucketedDataParallel.bucket_bytes = int(args.bucket_mib * 2**20)
    LibraryDDP.bucket_mib = args.bucket_mib

    def make(kind: type[Strategy], comm: Comm) -> Strategy:
        return kind(build(shape_of(args), seed=args.seed, device=str(ctx.device)), comm, adamw(args.lr))

    strategies = {name: make(kind, Comm()) for name, kind in KINDS.items()}
    alone = make(BucketedDataParallel, Comm())
    silent = make(DataParallel, Comm())
    silent.comm = Silent()
    actions: dict[str, Callable[[list[Batch]], object]] = {
        "compute": lambda batches: train_step(silent, batches),
        "communication": lambda batches: messages_of(alone),  # type: ignore[arg-type]
        **{name: lambda batches, s=s: train_step(s, batches) for name, s in strategies.items()},  # type: ignore[misc]
    }
    rows: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(args.steps + WARM_UP):
        batches = text.step()
        for name, action in actions.items():
            rows[name].append(timed_ms(lambda: action(batches), ctx.device))  # noqa: B023
    medians = {name: statistics.median(times[WARM_UP:]) for name, times in rows.items()}
    ratios = [d / b for d, b in zip(rows["ddp"][WARM_UP:], rows["buckets"][WARM_UP:], strict=True)]
    tokens = args.batch_size * args.accumulation * args.seq_len
    result = {"world_size": ctx.world_size, "backend": "nccl" if ctx.device.type == "cuda" else "gloo"}
    result |= {"compute_ms": medians["compute"], "communication_ms": medians["communication"]}
    for name in KINDS:
        exposed = medians[name] - medians["compute"]
        result |= {
            f"{name}_ms": medians[name],
            f"{name}_exposed_ms": exposed,
            f"{name}_hidden": 1 - exposed / medians["communication"],
            f"{name}_tokens_per_s": tokens / medians[name] * 1e3,
        }
    result["buckets_over_ddp"] = statistics.median(ratios)  # of tokens/s, so of the inverse times
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return result | {"buckets_over_ddp_p25": quartiles[0], "buckets_over_ddp_p75": quartiles[2]}


def show(result: dict) -> None:
    print(f"compute {result['compute_ms']:.1f} ms, communication alone {result['communication_ms']:.1f} ms")
    print(f"{'':10}{'step ms':>10}{'exposed ms':>12}{'hidden':>9}{'tokens/s':>11}")
    for name in KINDS:
        step, exposed, hidden, rate = (result[f"{name}_{k}"] for k in ("ms", "exposed_ms", "hidden", "tokens_per_s"))
        print(f"{name:10}{step:10.1f}{exposed:12.1f}{hidden:9.0%}{rate:11,.0f}")
    low, high = result["buckets_over_ddp_p25"], result["buckets_over_ddp_p75"]
    print(f"tokens/s of our buckets over DDP's: {result['buckets_over_ddp']:.3f} (quartiles {low:.3f} to {high:.3f})")


def draw(found: dict[str, dict], run: script.Run) -> None:
    """One bar for each kind and link: compute, and what of the communication shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(found), figsize=(3.6 * len(found), 3.2), layout="constrained", squeeze=False)
    for axes, (rate, row) in zip(grid.flat, found.items(), strict=True):
        names = list(KINDS)
        exposed = [max(0.0, row[f"{name}_exposed_ms"]) for name in names]
        axes.bar(names, [row["compute_ms"]] * len(names), color="#1f5c99", label="compute")
        bars = axes.bar(names, exposed, bottom=row["compute_ms"], color="#b3541e", label="communication that shows")
        axes.bar_label(bars, [f"{row[f'{name}_hidden']:.0%} hidden" for name in names], fontsize=8, padding=2)
        axes.set(title=rate, ylabel="ms a step")
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].legend(frameon=False, fontsize=8)
    figure.savefig(run.path("overlap.png"), dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = flags(__doc__)
    parser.add_argument("--bucket-mib", type=script.positive, default=1, help="of our buckets and of DDP's")
    parser.add_argument("--rates", type=lambda text: text.split(","), help="of virtual links: 200mbit,1gbit,5gbit")
    args = parser.parse_args(argv)
    shape_of(args)
    run = script.start(__file__, args)
    if args.rates:
        found = at_rates(__file__, as_flags(args, *SHARED_FLAGS, "bucket_mib"), args.rates, run)
        draw(found, run)
        kept = ("compute_ms", "communication_ms", "naive_hidden", "buckets_hidden", "ddp_hidden", "buckets_over_ddp")
        return {"world_size": 2} | {f"{key}_{rate}": row[key] for rate, row in found.items() for key in kept}
    with dist.session(args.device) as ctx:
        if ctx.world_size < 2:
            raise script.UserError("one rank sends nothing; start it with torchrun, or pass --rates 200mbit,1gbit")
        result = measure(args, ctx)
        if ctx.is_main:
            show(result)
            draw({"this network": result}, run)
        return result


if __name__ == "__main__":
    script.run(main)

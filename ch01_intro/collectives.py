"""Communication check: every collective verified, its latency by size, and faults that explain themselves.

You learn   what each collective does to the data, what small and large messages cost, what a broken job looks like
Laptop      torchrun --standalone --nproc-per-node=2 ch01_intro/collectives.py
Faults      python ch01_intro/collectives.py --diagnose       (a mismatched shape, a missing rank, a wrong address)
GPU node    torchrun --standalone --nproc-per-node=gpu ch01_intro/collectives.py --sizes-kib 1,64,1024,65536
Cluster     srun python ch01_intro/collectives.py             (one task a GPU)
You see     a table of medians, all verified; latency is flat for small messages and grows with the size for large ones.
            gloo figures say whether the software works, not how fast a GPU network is.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as td

from common import dist, ranks, script
from common.process import Child

FAULTS = ("mismatched-shape", "missing-rank", "wrong-address")
# Names of torch 2.13. Before it the same functions bore the second names, which 2.13 deprecates.
all_gather_single = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor
reduce_scatter_single = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor


def contribution(rank: int, numbers: int, device: torch.device) -> torch.Tensor:
    """What `rank` puts in, float32 [numbers]: small whole numbers, summed exactly, different by rank and place."""
    return (torch.arange(numbers, device=device) % 101 + 1000 * rank).float()


# Each runs one collective on this rank's tensor [n] and returns what came out. `parts` holds all ranks' tensors: for
# scatter, which sends them, and below to say what must come out.
Parts = list[torch.Tensor]


def all_reduce(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor:
    out = x.clone()
    td.all_reduce(out)
    return out


def reduce(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor | None:
    out = x.clone()
    td.reduce(out, dst=0)
    return out if ctx.is_main else None  # what the others hold afterwards is undefined


def broadcast(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor:
    out = x.clone()
    td.broadcast(out, src=0)
    return out


def all_gather(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor:
    out = x.new_empty(ctx.world_size * x.numel())
    all_gather_single(out, x)
    return out


def gather(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor | None:
    received = [torch.empty_like(x) for _ in parts] if ctx.is_main else None
    td.gather(x, received, dst=0)
    return torch.cat(received) if received else None


def scatter(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor:
    out = torch.empty_like(x)
    td.scatter(out, parts if ctx.is_main else None, src=0)
    return out


def reduce_scatter(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor:
    out = x.new_empty(x.numel() // ctx.world_size)
    reduce_scatter_single(out, x)
    return out


def all_to_all(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor:
    out = torch.empty_like(x)
    td.all_to_all_single(out, x)
    return out


def send_recv(x: torch.Tensor, parts: Parts, ctx: dist.Context) -> torch.Tensor:
    """Around a ring, each to its right. Posted together: two ranks that both send first would wait for each other."""
    out = torch.empty_like(x)
    pass_right(x, out, ctx)
    return out


def pass_right(x: torch.Tensor, out: torch.Tensor, ctx: dist.Context) -> None:
    """x goes to the next rank, and what the rank before sends comes into out."""
    left, right = (ctx.rank - 1) % ctx.world_size, (ctx.rank + 1) % ctx.world_size
    if left == ctx.rank:
        out.copy_(x)
        return
    for work in td.batch_isend_irecv([td.P2POp(td.isend, x, right), td.P2POp(td.irecv, out, left)]):
        work.wait()


COLLECTIVES: tuple[Callable[[torch.Tensor, Parts, dist.Context], torch.Tensor | None], ...] = (
    all_reduce, reduce, broadcast, all_gather, gather, scatter, reduce_scatter, all_to_all, send_recv,
)  # fmt: skip


def expected(name: str, parts: Parts, ctx: dist.Context) -> torch.Tensor:
    """What `name` must give on this rank, by definition."""
    share = parts[0].numel() // ctx.world_size
    mine = slice(ctx.rank * share, (ctx.rank + 1) * share)
    if name in ("all_reduce", "reduce", "reduce_scatter"):
        total = torch.stack(parts).sum(0)
        return total[mine] if name == "reduce_scatter" else total
    if name in ("all_gather", "gather"):
        return torch.cat(parts)
    if name == "all_to_all":
        return torch.cat([part[mine] for part in parts])
    return parts[{"broadcast": 0, "scatter": ctx.rank, "send_recv": (ctx.rank - 1) % ctx.world_size}[name]]


def agree(name: str, x: torch.Tensor, ctx: dist.Context) -> None:
    """Compare shape and dtype over all ranks before a collective, which would hang, crash or mix up data instead.

    Raises:
        UserError: ranks differ, or one did not come.
    """
    said = ctx.exchange(name, f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}")
    if len(set(said)) > 1:
        heard = ", ".join(f"rank {rank} has {word}" for rank, word in enumerate(said))
        raise script.UserError(f"{name}: {heard}; give every rank a tensor of the same shape and dtype")


def slowest_us(run: Callable[[], object], device: torch.device, repeats: int, calls: int = 1) -> list[float]:
    """The slowest rank's time of each repeat, in microseconds: a collective is over when it is over for all.

    A repeat is `calls` calls back to back, and its time is theirs divided by `calls`: on a GPU, starting a kernel and
    waiting for it can take longer than a small message.
    """
    times = []
    for _ in range(repeats):
        td.barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6 / calls)
    slowest = torch.tensor(times, dtype=torch.float64)
    td.all_reduce(slowest, op=td.ReduceOp.MAX)
    return slowest.tolist()


def check_all(args: argparse.Namespace, ctx: dist.Context) -> tuple[dict[str, list[float]], int]:
    """Verify and time each collective at each size. Returns the medians in us and the number of wrong results."""
    medians: dict[str, list[float]] = {c.__name__: [] for c in COLLECTIVES}
    wrong = 0
    for kib in args.sizes_kib:
        numbers = -(-kib * 256 // ctx.world_size) * ctx.world_size  # float32, rounded up to equal shares
        parts = [contribution(r, numbers, ctx.device) for r in range(ctx.world_size)]
        x = parts[ctx.rank].clone()
        for collective in COLLECTIVES:
            agree(collective.__name__, x, ctx)
            out = collective(x, parts, ctx)
            wrong += out is not None and not torch.equal(out, expected(collective.__name__, parts, ctx))
            once = functools.partial(collective, x, parts, ctx)
            medians[collective.__name__].append(statistics.median(slowest_us(once, ctx.device, args.repeats)))
    total = torch.tensor([wrong])
    td.all_reduce(total)
    return medians, int(total)


def break_it(fault: str, ctx: dist.Context) -> None:
    """Do on the last rank what goes wrong in real jobs."""
    last = ctx.rank == ctx.world_size - 1
    if fault == "missing-rank" and last:
        threading.Event().wait(60)  # stuck in a data loader, say; the launcher ends it when the others have given up
    x = contribution(ctx.rank, 1025 if last and fault == "mismatched-shape" else 1024, ctx.device)
    agree("all_reduce", x, ctx)


def diagnose() -> dict:
    """Start two ranks a fault, and collect what the healthy rank says and how soon it says it."""
    found = {}
    for fault in FAULTS:
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
        if fault == "wrong-address":
            env["MASTER_ADDR"] = "no-such-host.invalid"
        join_s = "5" if fault == "wrong-address" else "60"
        command = [
            "python",
            __file__,
            "--device",
            "cpu",
            "--fault",
            fault,
            "--join-timeout-s",
            join_s,
            "--timeout-s",
            "3",
        ]
        reporter = 1 if fault == "wrong-address" else 0  # rank 0 opens the port itself, rank 1 must find it
        with (
            Child(command, env={**env, "RANK": "0", "LOCAL_RANK": "0"}) as zero,
            Child(command, env={**env, "RANK": "1", "LOCAL_RANK": "1"}) as one,
        ):
            done = (zero, one)[reporter].wait(120)
        line = (done.stderr.strip().splitlines() or [done.reason()])[-1]
        print(f"{fault}: exit {done.returncode} after {done.seconds:.1f} s\n    {line}", flush=True)
        name = fault.replace("-", "_")
        found |= {f"{name}_exit": done.returncode, f"{name}_says": line, f"{name}_s": round(done.seconds, 1)}
    return found


def show(medians: dict[str, list[float]], sizes_kib: list[int], run: script.Run, backend: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    print(f"median latency in us by message size, {backend}")
    print("".join([f"{'':16}", *(f"{kib:>10} KiB" for kib in sizes_kib)]))
    for name, values in medians.items():
        print(f"{name:16}" + "".join(f"{value:14,.0f}" for value in values))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, values in medians.items():
        axes.loglog(sizes_kib, values, marker="o", markersize=4, label=name)
    axes.set(xlabel="message (KiB a rank)", ylabel="median latency (us)", title=f"Collectives over {backend}")
    axes.legend(frameon=False, ncols=2, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(run.path("latency.png"), dpi=130)
    pyplot.close(figure)


def sizes(text: str) -> list[int]:
    return [script.at_least(1)(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--sizes-kib", type=sizes, default=[1, 16, 256, 4096], help="message sizes, comma separated")
    parser.add_argument("--repeats", type=script.at_least(1), default=20)
    parser.add_argument(
        "--join-timeout-s", type=script.positive, default=60, help="how long to wait for all ranks to start"
    )
    parser.add_argument("--timeout-s", type=script.positive, default=60, help="how long a collective may take")
    parser.add_argument("--fault", choices=FAULTS, help="break something on the last rank, and see who says what")
    parser.add_argument("--diagnose", action="store_true", help="run all the faults, two ranks each")
    args = parser.parse_args(argv)
    run = script.start(__file__, args)
    if args.diagnose:
        return diagnose()
    with dist.session(args.device, join_timeout_s=args.join_timeout_s, timeout_s=args.timeout_s) as ctx:
        if args.fault:
            break_it(args.fault, ctx)
            return {}
        medians, wrong = check_all(args, ctx)
        if wrong:
            raise RuntimeError(f"{wrong} collectives gave wrong values")
        if ctx.is_main:
            show(medians, args.sizes_kib, run, f"{ctx.backend} between {ctx.world_size} ranks")
        smallest = {f"{name}_us": values[0] for name, values in medians.items()}
        return {
            "world_size": ctx.world_size,
            "backend": ctx.backend,
            "verified": len(COLLECTIVES) * len(args.sizes_kib),
            "wrong": wrong,
            **smallest,
        }


if __name__ == "__main__":
    script.run(main)

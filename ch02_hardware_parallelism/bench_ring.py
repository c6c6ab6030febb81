"""Our ring all-reduce against the library's: bus bandwidth, measured in turn within one run.

You learn   what makes a ring fast: pieces large enough to be worth a message and small enough that the sum of one hides
            behind the transfer of the next, receives posted ahead, buffers that are kept
Laptop      python ch02_hardware_parallelism/bench_ring.py     (starts two ranks; compare --piece-kib 64 --ahead 1)
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/bench_ring.py --sizes-mib 64,1024
Cluster     srun python ch02_hardware_parallelism/bench_ring.py      (one task a GPU)
You see     a row a size: median bus bandwidths, and the ratio of neighbouring measurements with its quartiles. On two
            ranks of one machine the ring keeps up with gloo; NCCL, which sums on its way through the GPU, is faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as td

from ch02_hardware_parallelism import allreduce, alpha_beta
from ch02_hardware_parallelism.messages import Peers
from common import dist, ranks, script


def once_s(all_reduce: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Seconds of the slowest rank for one all-reduce of ones, whose result is checked.

    Raises:
        RuntimeError: it is not the sum.
    """
    x.fill_(1)
    td.barrier()
    begin = time.perf_counter()
    all_reduce(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    td.all_reduce(slowest, op=td.ReduceOp.MAX)
    if not (x == td.get_world_size()).all():
        raise RuntimeError("an all-reduce gave wrong values")
    return slowest.item()


def compare(sizes_mib: Sequence[int], repeats: int, device: str) -> dict[int, tuple[list[float], list[float]]]:
    """On every rank: seconds of the ring and of the library, by size in MiB. In turn, for a shared machine's sake."""
    with dist.session(device, threads=1) as ctx:  # one thread sums, as in the library
        peers = Peers()
        times: dict[int, tuple[list[float], list[float]]] = {}
        for mib in sizes_mib:
            x = torch.empty(mib * 2**18, device=ctx.device)
            ours, library = times[mib] = ([], [])
            contestants = [(lambda x: allreduce.ring(x, peers), ours), (td.all_reduce, library)]
            for number in range(-2, repeats):  # two rounds to warm up
                for run, into in contestants if number % 2 else reversed(contestants):
                    seconds = once_s(run, x)
                    if number >= 0:
                        into.append(seconds)
        return times


def sizes(text: str) -> list[int]:
    return [script.at_least(1)(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--sizes-mib", type=sizes, default=[16, 64], help="buffer sizes, comma separated")
    parser.add_argument("--repeats", type=script.at_least(3), default=15)
    parser.add_argument("--ranks", type=script.at_least(2), default=2, help="to start, where no launcher has")
    parser.add_argument("--piece-kib", type=script.at_least(1), default=allreduce.PIECE // 1024)
    parser.add_argument("--ahead", type=script.at_least(1), default=allreduce.AHEAD, help="pieces under way at once")
    args = parser.parse_args(argv)
    launch = dist.read_launch()
    if args.ranks > 64:
        raise script.UserError(f"--ranks {args.ranks} would start as many processes here; take up to 64")
    run = script.start(__file__, args)
    job = (args.sizes_mib, args.repeats, args.device, args.piece_kib * 1024, args.ahead)
    if launch.launcher == "python":
        times, world = ranks.values(ranks.run_ranks(tuned, args.ranks, *job, timeout_s=600))[0], args.ranks
    elif launch.world_size == 1:
        raise script.UserError("one rank has nobody to talk to; start two or more")
    else:
        times, world = tuned(*job), launch.world_size
    library = "nccl" if dist.pick_device(args.device, launch).type == "cuda" else "gloo"
    return report(times, world, library, run)


def tuned(sizes_mib: list[int], repeats: int, device: str, piece: int, ahead: int) -> dict:
    allreduce.PIECE, allreduce.AHEAD = piece, ahead
    return compare(sizes_mib, repeats, device)


def report(times: dict[int, tuple[list[float], list[float]]], world: int, library: str, run: script.Run) -> dict:
    factor = alpha_beta.bus_factor("all_reduce", world)
    result: dict = {"world_size": world, "library": library}
    if dist.read_launch().rank == 0:
        print(f"all-reduce over {world} ranks, bus bandwidth in GiB/s (medians)")
        print(f"{'MiB':>6}{'ring':>9}{library:>9}{'ring over ' + library:>18}{'quartiles':>16}")
    for mib, (ours, theirs) in times.items():
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speeds = [factor * mib / 1024 / statistics.median(t) for t in (ours, theirs)]
        run.log(mib=mib, ring_s=ours, library_s=theirs)
        result[f"ring_over_{library}_{mib}mib"] = middle
        result[f"ring_over_{library}_{mib}mib_quartiles"] = [low, high]
        result |= {f"ring_bus_gib_per_s_{mib}mib": speeds[0], f"{library}_bus_gib_per_s_{mib}mib": speeds[1]}
        if dist.read_launch().rank == 0:
            print(f"{mib:6}{speeds[0]:9.2f}{speeds[1]:9.2f}{middle:18.2f}{low:9.2f} -{high:5.2f}")
    return result


if __name__ == "__main__":
    script.run(main)

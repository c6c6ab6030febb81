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
from collections.abc import Sequence

import torch
import torch.distributed as td

from ch02_hardware_parallelism import allreduce, alpha_beta
from ch02_hardware_parallelism.checked_collectives import check_memory, sum_once
from ch02_hardware_parallelism.messages import Peers
from common import dist, ranks, script

GOAL, LARGE_MIB = 0.9, 16  # the ring keeps up if it has this share of the library's bandwidth at these sizes
Times = tuple[list[float], list[float], int]  # seconds of the ring, of the library; how many gave wrong sums


def compare(sizes_mib: Sequence[int], repeats: int, device: str) -> dict[int, Times]:
    """On every rank: the times by size in MiB. Measured in turn, for a shared machine's sake."""
    with dist.session(device, threads=1) as ctx:  # one thread sums, as in the library
        peers, found = Peers(), {}
        for mib in sizes_mib:
            ours, library, wrong = [], [], 0
            x = torch.empty(mib * 2**18, device=ctx.device)
            contestants = [(lambda x: allreduce.ring(x, peers), ours), (td.all_reduce, library)]
            for number in range(-2, repeats):  # two rounds to warm up
                for run, into in contestants if number % 2 else reversed(contestants):
                    seconds, right = sum_once(run, x)
                    wrong += not right
                    if number >= 0:
                        into.append(seconds)
            found[mib] = ours, library, wrong
        return found


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    sizes = script.comma_list(script.at_least(1))
    parser.add_argument("--sizes-mib", type=sizes, default=[16, 64], help="buffer sizes, comma separated")
    parser.add_argument("--repeats", type=script.at_least(3), default=31, help="a few are disturbed on any machine")
    parser.add_argument("--ranks", type=script.at_least(2), default=2, help="to start, where no launcher has")
    parser.add_argument("--piece-kib", type=script.at_least(1), default=allreduce.PIECE // 1024)
    parser.add_argument("--ahead", type=script.at_least(1), default=allreduce.AHEAD, help="pieces under way at once")
    args = parser.parse_args(argv)
    launch = dist.read_launch()
    if args.ranks > 64:
        raise script.UserError(f"--ranks {args.ranks} would start as many processes here; take up to 64")
    world = args.ranks if launch.launcher == "python" else launch.world_size
    if world == 1:
        raise script.UserError("one rank has nobody to talk to; start two or more")
    rank_bytes = 3 * max(args.sizes_mib) * 2**20  # the buffer, the library's own, and what the check makes
    check_memory("--sizes-mib", rank_bytes, args.device, launch, args.ranks if launch.launcher == "python" else None)
    run = script.start(__file__, args)
    job = (args.sizes_mib, args.repeats, args.device, args.piece_kib * 1024, args.ahead)
    if launch.launcher == "python":
        found = ranks.values(ranks.run_ranks(tuned, world, *job, timeout_s=600))[0]
    else:
        found = tuned(*job)
    library = "nccl" if dist.pick_device(args.device, launch).type == "cuda" else "gloo"
    result = report(found, world, library, run)
    if wrong := result["wrong"]:
        raise script.CheckFailed(f"{wrong} all-reduces gave wrong sums: trust neither them nor their times", result)
    return result


def tuned(sizes_mib: list[int], repeats: int, device: str, piece: int, ahead: int) -> dict[int, Times]:
    allreduce.PIECE, allreduce.AHEAD = piece, ahead
    return compare(sizes_mib, repeats, device)


def report(found: dict[int, Times], world: int, library: str, run: script.Run) -> dict:
    """Print the table. The RESULT: of each size the ratio and both bandwidths, and whether the ring keeps up."""
    factor = alpha_beta.bus_factor("all_reduce", world)
    result: dict = {"world_size": world, "library": library, "wrong": sum(wrong for *_, wrong in found.values())}
    table = [
        f"all-reduce over {world} ranks, bus bandwidth in GiB/s (medians)",
        f"{'MiB':>6}{'ring':>9}{library:>9}{'ring over ' + library:>18}{'quartiles':>16}",
    ]
    for mib, (ours, theirs, _) in found.items():
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speeds = [factor * mib / 1024 / statistics.median(t) for t in (ours, theirs)]
        run.log(mib=mib, ring_s=ours, library_s=theirs)
        result[f"ring_over_{library}_{mib}mib"] = middle
        result[f"ring_over_{library}_{mib}mib_quartiles"] = [low, high]
        result |= {f"ring_bus_gib_per_s_{mib}mib": speeds[0], f"{library}_bus_gib_per_s_{mib}mib": speeds[1]}
        table.append(f"{mib:6}{speeds[0]:9.2f}{speeds[1]:9.2f}{middle:18.2f}{low:9.2f} -{high:5.2f}")
    if large := [mib for mib in found if mib >= LARGE_MIB]:
        keeps_up = all(result[f"ring_over_{library}_{mib}mib"] >= GOAL for mib in large)
        result["keeps_up"] = keeps_up
        verdict = "has" if keeps_up else "does not have"
        table.append(f"from {LARGE_MIB} MiB on the ring {verdict} at least {GOAL} of {library}'s bandwidth")
    if dist.read_launch().rank == 0:
        print("\n".join(table))
    return result


if __name__ == "__main__":
    script.run(main)

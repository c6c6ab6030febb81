"""All-reduce over different network topologies: predicted from latency and bandwidth, and measured.

You learn   which algorithm wins for small and for large messages, what a thin uplink between racks does to each, and
            why the order of a ring must follow the racks
Laptop      python ch02_hardware_parallelism/topologies.py     (four hosts in a virtual cluster: one rack, then two)
Faster      python ch02_hardware_parallelism/topologies.py --quick
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/topologies.py --sizes-kib 1,65536
Cluster     srun python ch02_hardware_parallelism/topologies.py     (the network as it is; each node counts as a rack)
You see     a table a topology: measured and predicted ms, the winners of each size starred. Small: few rounds win.
            Large: few bytes. Over the thin uplink a ring in a bad order takes twice as long as in the racks' order.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as td

from ch01_intro.roofline import synchronize
from ch02_hardware_parallelism import allreduce, alpha_beta, virtual_cluster
from ch02_hardware_parallelism.checked_collectives import check_memory, sum_once
from ch02_hardware_parallelism.messages import Peers
from ch02_hardware_parallelism.predicted import AllReduce, predicted_s
from common import dist, script

# Bytes of the large ping-pong: as many as take PROBE_S on this link, be it NVLink. None of some KiB: a shaped link lets
# those through at once (its token bucket).
LEAST_PROBE, LARGEST_PROBE, PROBE_S = 2**19, 2**29, 2e-3
HOSTS = 4
SHORT_KIB = 64  # below it a run is repeated more often: other work on the machine disturbs it more


def racks_of_ranks(ctx: dist.Context) -> list[int] | None:
    """Each rank's rack: of the virtual cluster, or its node of several. None: all ranks are alike."""
    per_host = ctx.launch.local_world_size
    if cluster := virtual_cluster.described():
        racks = [cluster.rack_of_host[rank // per_host] for rank in range(ctx.world_size)]
    else:
        racks = [rank // per_host for rank in range(ctx.world_size)]
    return racks if 1 < len(set(racks)) < ctx.world_size else None


def one_way_s(peers: Peers, other: int, size: int, repeats: int, device: torch.device) -> float:
    """Half the round trip of `size` bytes between rank 0 and `other`: the median, the first not counted. On all."""
    x, times = torch.zeros(size, dtype=torch.uint8, device=device), []
    for _ in range(repeats + 1):
        td.barrier()
        begin = time.perf_counter()
        if peers.rank == 0:
            peers.exchange(sends=[(x, other)])
            peers.exchange(receives=[(x, other)])
        elif peers.rank == other:
            peers.exchange(receives=[(x, 0)])
            peers.exchange(sends=[(x, 0)])
        synchronize(device)
        times.append((time.perf_counter() - begin) / 2)
    shared = [statistics.median(times[1:])]
    td.broadcast_object_list(shared, src=0)
    return shared[0]


def ping_pong(peers: Peers, other: int, repeats: int, device: torch.device) -> alpha_beta.AlphaBeta:
    """The path between rank 0 and `other`, fitted to a few bytes and to as many as take some time on it."""
    large = LEAST_PROBE
    while large < LARGEST_PROBE and one_way_s(peers, other, large, 1, device) < PROBE_S:
        large *= 4
    sizes = (8, large // 4, large)
    return alpha_beta.fit(sizes, [one_way_s(peers, other, size, repeats, device) for size in sizes])


def median_s(run: Callable[[torch.Tensor], object], x: torch.Tensor, repeats: int) -> tuple[float, int]:
    """Of the slowest rank's time, the first run not counted; and how many runs gave wrong sums."""
    seconds, right = zip(*(sum_once(run, x) for _ in range(repeats + 1)), strict=True)
    return statistics.median(seconds[1:]), right.count(False)


def contestants(size: int, rack_of: list[int] | None) -> dict[str, AllReduce]:
    """The algorithms; the ring in rank order, and where there are racks also in one that changes racks each step."""
    found = dict(allreduce.ALGORITHMS)
    if rack_of is None:
        del found["hierarchical"]  # nothing to follow
        return found
    found["hierarchical"] = functools.partial(allreduce.hierarchical, rack_of=rack_of)
    place = [rack_of[:rank].count(rack_of[rank]) for rank in range(size)]  # within its rack
    bad = sorted(range(size), key=lambda rank: (place[rank], rack_of[rank]))
    found["ring_bad_order"] = functools.partial(allreduce.ring, order=bad)
    return found


def compare(args: argparse.Namespace) -> dict:
    """On every rank of a job: measure the links, then every algorithm at every size, beside what it should take.

    Raises:
        CheckFailed: an algorithm gave wrong sums.
    """
    with dist.session(args.device, threads=1) as ctx:
        peers, rack_of = Peers(), racks_of_ranks(ctx)
        link = ping_pong(peers, 1, args.repeats, ctx.device)
        far = next((rank for rank in range(ctx.world_size) if rack_of and rack_of[rank] != rack_of[0]), None)
        uplink = ping_pong(peers, far, args.repeats, ctx.device) if far else None
        result: dict = {"world_size": ctx.world_size, "racks": len(set(rack_of or [0])), **described("link", link)}
        result |= described("uplink", uplink) if uplink else {}
        table: dict[str, list[tuple[float, float | None]]] = {}
        wrong: Counter[str] = Counter()
        for kib in args.sizes_kib:
            x = torch.empty(kib * 256, device=ctx.device)
            repeats = args.repeats * (4 if kib < SHORT_KIB else 1)
            for name, algorithm in contestants(ctx.world_size, rack_of).items():
                measured, bad = median_s(lambda x, run=algorithm: run(x, peers), x, repeats)
                predicted = predicted_s(algorithm, kib * 1024, ctx.world_size, link, rack_of=rack_of, uplink=uplink)
                table.setdefault(name, []).append((measured * 1e3, predicted * 1e3))
                wrong[name] += bad
            measured, bad = median_s(td.all_reduce, x, repeats)
            table.setdefault("library", []).append((measured * 1e3, None))
            wrong["library"] += bad
        result["wrong"] = wrong.total()
        for number, kib in enumerate(args.sizes_kib):
            times = {name: row[number][0] for name, row in table.items()}
            result[f"winner_{kib}kib"] = min(times.keys() - {"library"}, key=times.__getitem__)
            expected = {name: row[number][1] for name, row in table.items() if row[number][1] is not None}
            result[f"predicted_winner_{kib}kib"] = min(expected, key=expected.__getitem__)
            for name, row in table.items():
                result[f"{name}_{kib}kib_ms"] = row[number][0]
                if row[number][1] is not None:
                    result[f"{name}_{kib}kib_predicted_ms"] = row[number][1]
        if ctx.is_main:
            show(result, args.sizes_kib, list(table))
    if bad_ones := sorted(+wrong):
        raise script.CheckFailed(f"wrong sums by {', '.join(bad_ones)}: do not trust their times either", result)
    return result


def described(name: str, path: alpha_beta.AlphaBeta) -> dict:
    return {f"{name}_alpha_us": path.alpha_s * 1e6, f"{name}_mbit_per_s": path.bytes_per_s * 8 / 1e6}


def show(result: dict, sizes_kib: list[int], names: list[str]) -> None:
    for path in ("link", "uplink"):
        if f"{path}_alpha_us" in result:
            alpha, rate = result[f"{path}_alpha_us"], result[f"{path}_mbit_per_s"]
            print(f"{path}: alpha {alpha:.0f} us, 1/beta {rate:.4g} Mbit/s, by ping-pong")
    print(f"{'ms':18}" + "".join(f"{f'{kib} KiB':>12}{'predicted':>12}" for kib in sizes_kib))
    for name in names:
        line = f"{name:18}"
        for kib in sizes_kib:
            for predicted in ("", "predicted_"):
                star = "*" if result[f"{predicted}winner_{kib}kib"] == name else " "
                ms = result.get(f"{name}_{kib}kib_{predicted}ms")
                line += " " * 12 if ms is None else f"{ms:11.2f}{star}"
        print(line.rstrip())
    print(flush=True)


def over_topologies(args: argparse.Namespace, run: script.Run) -> dict:
    """Start this script again in a virtual cluster of each topology, and put the answers together.

    Raises:
        CheckFailed: an algorithm gave wrong sums.
    """
    found: dict[str, dict] = {}
    for name in args.topologies:
        shape = shape_of(name, args)
        racks = f", racks of 2 at {args.uplink_rate}" if name == "racks" else ""
        print(f"{name}: {HOSTS} hosts at {args.rate}{racks}", flush=True)
        flags = ["--sizes-kib", ",".join(map(str, args.sizes_kib)), "--repeats", str(args.repeats), "--device", "cpu"]
        command = [__file__, *flags, "--run-dir", str(run.path(name).resolve())]
        done = virtual_cluster.run(command, timeout_s=300, **shape)
        if done.returncode == 2:
            raise script.UserError(done.reason().partition("error: ")[2] or done.reason())
        if done.result is None or (done.returncode and not done.result["wrong"]):
            raise RuntimeError(f"{name}: {done.reason()}\n{done.stderr[-2000:]}")
        print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("RESULT")), flush=True)
        found[name] = done.result
    plot(found, args.sizes_kib, run)
    result = {f"{name}_{key}": value for name, answer in found.items() for key, value in answer.items()}
    if racks := found.get("racks"):
        large = f"{max(args.sizes_kib)}kib_ms"
        result["bad_order_over_good"] = racks[f"ring_bad_order_{large}"] / racks[f"ring_{large}"]
    if wrong := [name for name, answer in found.items() if answer["wrong"]]:
        raise script.CheckFailed(f"wrong sums over {' and '.join(wrong)}; see the lines above", result)
    return result


def shape_of(topology: str, args: argparse.Namespace) -> dict:
    """The virtual cluster of that name, in virtual_cluster.run's words."""
    shape = {"hosts": HOSTS, "rate": args.rate}
    return shape | {"racks": 2, "uplink_rate": args.uplink_rate} if topology == "racks" else shape


def plot(found: dict[str, dict], sizes_kib: list[int], run: script.Run) -> None:
    """A PNG: measured as bars, predicted as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(found), len(sizes_kib), figsize=(5 * len(sizes_kib), 2.9 * len(found)), layout="constrained", squeeze=False
    )
    for row, (topology, result) in zip(grid, found.items(), strict=True):
        for axes, kib in zip(row, sizes_kib, strict=True):
            ending = f"_{kib}kib_ms"
            names = [key.removesuffix(ending) for key in result if key.endswith(ending)]
            names = sorted(names, key=lambda name: (name == "library", result[name + ending]))
            best = result[f"winner_{kib}kib"]
            colours = ["#9aa5b1" if n == "library" else "#2a9d8f" if n == best else "#8ecae6" for n in names]
            axes.barh(names, [result[name + ending] for name in names], color=colours, label="measured")
            marks = [(result.get(f"{n}_{kib}kib_predicted_ms"), n) for n in names if n != "library"]
            axes.plot(*zip(*marks, strict=True), "|", color="#d1495b", markersize=16, mew=2.5, label="predicted")
            axes.invert_yaxis()
            axes.set(title=f"{topology}, {kib} KiB", xlabel="ms")
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False)
    figure.suptitle(f"All-reduce over {HOSTS} hosts: one rack, and two with a thin uplink", weight="bold")
    figure.savefig(run.path("topologies.png"), dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    sizes = script.comma_list(script.at_least(1))
    parser.add_argument("--sizes-kib", type=sizes, default=[1, 2048], help="buffer sizes, comma separated")
    parser.add_argument("--repeats", type=script.at_least(1), default=9)
    parser.add_argument("--topologies", nargs="+", choices=("flat", "racks"), default=["flat", "racks"])
    parser.add_argument("--rate", default="200mbit", help="of a host's link in the virtual cluster, in tc's units")
    parser.add_argument("--uplink-rate", default="50mbit", help="of a rack's link there")
    parser.add_argument("--quick", action="store_true", help="1 MiB and 5 repeats")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes_kib, args.repeats = [1, 1024], 5
    launch = dist.read_launch()
    alone = launch.launcher == "python"
    if alone:
        for name in args.topologies:
            virtual_cluster.plan(**shape_of(name, args))
        virtual_cluster.check_here("; or start this with torchrun on a network that there is")
    elif launch.world_size == 1:
        raise script.UserError("one rank has nobody to talk to; start two or more, or plain python for a cluster")
    world, device = (HOSTS, "cpu") if alone else (launch.world_size, args.device)
    rank_bytes = (world + 1) * max(args.sizes_kib) * 1024  # naive: rank 0 holds everybody's
    check_memory("--sizes-kib", rank_bytes, device, launch, HOSTS if alone else None)
    run = script.start(__file__, args)
    return over_topologies(args, run) if alone else compare(args)


if __name__ == "__main__":
    script.run(main)

"""Before a job of many nodes: look for what would break it, and say which node, which pair, and what to do about it.

You learn   what all nodes must agree on, which interface a job leaves through and why it is often the wrong one, and
            how to find the one pair of a hundred nodes that cannot connect, without a collective that would hang on it
Laptop      torchrun --standalone --nproc-per-node=2 ch03_ddp/preflight.py
Two hosts   python -m ch02_hardware_parallelism.virtual_cluster -- ch03_ddp/preflight.py
            python -m ch02_hardware_parallelism.virtual_cluster -- ch03_ddp/preflight.py --plant version,clock,interface
Cluster     sbatch ch03_ddp/launch/train.sbatch ch03_ddp/preflight.py           (launcher, nodes and modules of the job)
You see     a table of the nodes, a line for each check, and a verdict. Exit code 2 and one line, if a job would break

All of it goes through the store, and TCP connections with a timeout. Only when nothing is wrong, the ranks open their
process group, and one all_reduce is checked and timed.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as torch_dist

from ch03_ddp import preflight_checks as checks
from ch03_ddp import preflight_facts as facts_of
from ch03_ddp.preflight_checks import BROKEN, OK, WARN, Check
from ch03_ddp.preflight_facts import Facts
from common import dist, script

CLOCK_ROUNDS, REDUCE_ROUNDS, REDUCE_MIB = 10, 10, 4


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--timeout-s", type=script.positive, default=60, help="for the ranks to meet, and each step")
    parser.add_argument("--connect-timeout-s", type=script.positive, default=5, help="for each connection of a pair")
    parser.add_argument("--clock-bound-ms", type=script.positive, default=100, help="a warning above it")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the job will write: is there room?")
    parser.add_argument(
        "--plant", type=script.comma_list(fault), default=[], help="faults on the last node, to see what is said: "
        "version (a torch of its own), clock (5 s ahead), interface (GLOO_SOCKET_IFNAME=lo)",
    )  # fmt: skip
    return parser.parse_args(argv)


def fault(text: str) -> str:
    """argparse type: one of those that --plant knows."""
    if text not in ("version", "clock", "interface"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of version, clock, interface")
    return text


@contextmanager
def meeting(args: argparse.Namespace) -> Iterator[dist.Context]:
    """The ranks meet at the store, without a process group. The mistake of one ends the waiting of all."""
    launch = dist.read_launch()
    device = dist.pick_device(args.device, launch)
    ctx = dist.Context(launch, device, "", dist.join(launch, args.timeout_s), args.timeout_s)
    try:
        yield ctx
    except script.UserError as error:
        ctx.store.compare_set(dist.FAILED, "", f"rank {ctx.rank} found: {error}")
        raise
    except RuntimeError as error:  # a wait at the store was in vain
        raise script.UserError(f"rank {ctx.rank} lost the others ({error}); look at their own errors") from error
    finally:  # rank 0 may be the store's host: it leaves last
        with suppress(RuntimeError):
            ctx.store.set(f"goodbye/{ctx.rank}", "")
            for rank in range(ctx.world_size if ctx.is_main else 0):
                ctx.store.get(f"goodbye/{rank}")


def clock_offset(ctx: dist.Context, first_ranks: Sequence[int], ahead_s: float) -> tuple[float, float]:
    """This node's clock minus rank 0's and the bound of the error, in ms: half of the fastest round trip's time.

    As NTP: rank 0's time is read somewhere between our question and its answer, and is compared with the middle.
    """
    store, best = ctx.store, (0.0, float("inf"))
    if ctx.is_main:
        for rank in first_ranks[1:]:
            for number in range(CLOCK_ROUNDS):
                store.get(f"clock/ask/{rank}/{number}")
                store.set(f"clock/answer/{rank}/{number}", repr(time.time()))
        return 0.0, 0.0
    for number in range(CLOCK_ROUNDS):
        begin, clock = time.perf_counter(), time.time() + ahead_s
        store.set(f"clock/ask/{ctx.rank}/{number}", "")
        answer = float(store.get(f"clock/answer/{ctx.rank}/{number}"))
        trip = time.perf_counter() - begin
        best = min(best, ((clock + trip / 2 - answer) * 1e3, trip / 2 * 1e3), key=lambda found: found[1])
    return best


def serve(listener: socket.socket, word: bytes) -> None:
    """Answer every connection with `word`, until the listener is closed."""
    while True:
        try:
            with listener.accept()[0] as peer:
                peer.sendall(word)
        except OSError:
            return


def try_pairs(ctx: dist.Context, me: int | None, nodes: Sequence[Facts], timeout_s: float) -> list[Check]:
    """From every node to every other a TCP connection to a free port, in both directions; and their names.

    Each node has its own word, so that a connection that ends at another machine counts as failed.
    """
    hosts = [node.host for node in nodes]
    failed: list[tuple[int, int, str]] = []
    unknown: list[tuple[int, int]] = []
    if me is None:
        ctx.exchange("ports", "")
    else:
        with socket.create_server((nodes[me].address, 0), backlog=1024) as listener:
            word = secrets.token_hex(16)
            threading.Thread(target=serve, args=(listener, word.encode()), daemon=True).start()
            said = ctx.exchange("ports", json.dumps([*listener.getsockname()[:2], word]))
            targets = [json.loads(text) for text in said if text]

            def reach(other: int) -> None:
                address, port, theirs = targets[other]
                try:
                    with socket.create_connection((address, port), timeout=timeout_s) as peer:
                        peer.settimeout(timeout_s)
                        if peer.recv(32, socket.MSG_WAITALL) != theirs.encode():
                            failed.append((me, other, f"{address}:{port} is answered by another machine"))
                except OSError as error:
                    why = "timed out" if isinstance(error, TimeoutError) else error.strerror or error
                    failed.append((me, other, f"{address}:{port} {str(why).lower()}"))
                if not facts_of.addresses_of(hosts[other]):
                    unknown.append((me, other))

            others = [threading.Thread(target=reach, args=(node,)) for node in range(len(nodes)) if node != me]
            for thread in others:
                thread.start()
            for thread in others:
                thread.join()
            ctx.exchange("connected", "")  # the listener stays until all are done
    if me is None:
        ctx.exchange("connected", "")
    found = [json.loads(text) for text in ctx.exchange("pairs", json.dumps([failed, unknown]))]
    all_failed = sorted(tuple(pair) for failures, _ in found for pair in failures)
    return checks.unreachable(hosts, all_failed) + checks.unresolved(hosts, [tuple(p) for _, u in found for p in u])


def reduce_and_check(args: argparse.Namespace) -> tuple[Check, float]:
    """A small all_reduce: right? And its median time, in ms."""
    with dist.session(args.device, join_timeout_s=args.timeout_s, timeout_s=args.timeout_s) as ctx:
        times = []
        for _ in range(REDUCE_ROUNDS):
            values = torch.full((REDUCE_MIB * 2**18,), float(ctx.rank + 1), device=ctx.device)
            begin = time.perf_counter()
            torch_dist.all_reduce(values)
            right = bool((values == ctx.world_size * (ctx.world_size + 1) / 2).all())  # also waits for the GPU
            times.append((time.perf_counter() - begin) * 1e3)
        wrong = [rank for rank, said in enumerate(ctx.exchange("sum", str(right))) if said != "True"]
        milliseconds = statistics.median(times)
        if wrong:
            found = f"wrong sums on rank {dist.compress(wrong)}"
            return Check(
                "all_reduce", BROKEN, found, "a fault of the network or a library: try without it"
            ), milliseconds
        found = f"{REDUCE_MIB} MiB over {ctx.world_size} ranks: right, {milliseconds:.1f} ms ({ctx.backend})"
        return Check("all_reduce", OK, found), milliseconds


def report(nodes: Sequence[Facts], found: Sequence[Check]) -> None:
    print(f"{'node':16}{'ranks':>6}{'interface':>12}{'address':>17}{'MTU':>7}{'Mbit/s':>8}{'clock ms':>10}", end="")
    print(f"{'shm GiB':>9}{'disk GiB':>10}{'files':>9}  GPUs")
    for n in nodes:
        speed, clock = n.speed_mbit or "?", f"{n.clock_ms:+.1f}"
        print(
            f"{n.host:16}{n.local_world_size:>6}{n.interface:>12}{n.address:>17}{n.mtu:>7}{speed:>8}{clock:>10}", end=""
        )
        print(f"{n.shm_gib:>9.1f}{n.disk_gib:>10.1f}{n.open_files:>9}  {checks.counted(n.gpus)}")
    print()
    for check in found:
        print(f"{check.verdict:7}{check.topic:11}{check.found}" + (f"\n{'':18}{check.fix}" if check.fix else ""))


def examine(ctx: dist.Context, args: argparse.Namespace) -> tuple[list[Facts], list[Check]]:
    """The nodes' reports and the verdicts on them: the same on every rank."""
    launch = ctx.launch
    starts = [rank for rank, local in enumerate(ctx.exchange("places", str(launch.local_rank))) if local == "0"]
    me = starts.index(ctx.rank) if launch.local_rank == 0 else None
    planted = args.plant if me is not None and 0 < me == len(starts) - 1 else []
    if "interface" in planted:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    mine = facts_of.here(launch, args.out.resolve())
    if "version" in planted:
        mine.versions["torch"] += ".planted"
    # The other nodes look at the way to node 0, and node 0 at the way to the last one.
    if me != 0 or len(starts) == 1:
        facts_of.find_interface(mine, launch.address)
    addresses = ctx.exchange("addresses", mine.address)
    if me == 0 and len(starts) > 1:
        facts_of.find_interface(mine, addresses[starts[-1]])
    if me is not None:
        mine.clock_ms, mine.clock_pm_ms = clock_offset(ctx, starts, 5.0 if "clock" in planted else 0.0)
    ranks = [Facts(**json.loads(text)) for text in ctx.exchange("facts", json.dumps(asdict(mine)))]
    nodes = [ranks[rank] for rank in starts]
    found = checks.all_checks(nodes, ranks, cuda=ctx.device.type == "cuda", clock_bound_ms=args.clock_bound_ms)
    pairs = try_pairs(ctx, me, nodes, args.connect_timeout_s)
    summary = f"{len(nodes) * (len(nodes) - 1)} connections between {len(nodes)} nodes, all names known"
    return nodes, found + (pairs or [Check("connect", OK, summary)])


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    run = script.start(__file__, args)
    milliseconds = None
    with meeting(args) as ctx:
        nodes, found = examine(ctx, args)
        if all(check.verdict != BROKEN for check in found):
            reduced, milliseconds = reduce_and_check(args)
            found.append(reduced)
    broken = [check for check in found if check.verdict == BROKEN]
    result = {
        "nodes": len(nodes),
        "world_size": ctx.world_size,
        "verdict": "broken" if broken else "ready",
        "broken": [f"{check.topic}: {check.found}" for check in broken],
        "warnings": [f"{check.topic}: {check.found}" for check in found if check.verdict == WARN],
        "clock_offset_ms_max": max(abs(node.clock_ms) for node in nodes),
        "all_reduce_mib": REDUCE_MIB,
        "all_reduce_ms": milliseconds,
        "interfaces": [node.interface for node in nodes],
    }
    if ctx.is_main:
        report(nodes, found)
        print(f"\n{'NOT READY' if broken else 'ready'}: {len(nodes)} nodes, {ctx.world_size} ranks", flush=True)
    if broken and ctx.is_main:
        run.finish(result)
        print("RESULT " + json.dumps(result), flush=True)
        more = f" (and {len(broken) - 1} more, see above)" if len(broken) > 1 else ""
        raise script.UserError(f"{broken[0].found}{more}; {broken[0].fix}")
    if broken:
        raise SystemExit(2)  # rank 0 has said it
    return result


if __name__ == "__main__":
    script.run(main)

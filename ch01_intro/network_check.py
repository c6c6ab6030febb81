"""Which high-speed network does this host have, and what does it mean for training over several nodes?

You learn   RDMA against TCP. With TCP a byte is copied from the application to the kernel, cut into packets, handed to
            the NIC, and copied again on the other side: CPU time, and tens of microseconds. With RDMA the application
            registers a buffer once (which pins it: memlock), and the NIC itself moves it into the other host's buffer:
            no copies, no kernel on the way, one or two microseconds. InfiniBand is a network made for that (lossless by
            credits); RoCE v2 carries the same in UDP over Ethernet and wants a network that loses no packet (PFC, ECN);
            EFA is AWS's own. With GPUDirect RDMA the buffer may lie in GPU memory, and the CPU's memory is left out.
Laptop      python ch01_intro/network_check.py
            python ch01_intro/network_check.py --from tests/fixtures/topology/hgx_h100
GPU node    python ch01_intro/network_check.py
Cluster     srun --ntasks-per-node=1 --nodes=1 python ch01_intro/network_check.py
You see     each device with a verdict (ok, attention, absent) and its consequence; a table, derived from the rate of
            the links by the ring formula, of how long the gradients of a model travel; and a TCP round trip measured on
            loopback, which is the cost of the software alone and says nothing about a network
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time
from pathlib import Path

from ch01_intro.topology import Machine, detect
from ch01_intro.topology.detect import source
from ch01_intro.topology.network import (
    ABSENT,
    ATTENTION,
    OK,
    Finding,
    fabric,
    findings,
    node_gbps,
    ring_allreduce_seconds,
)
from common import logs, script

MODELS = {"nano (4M)": 4e6, "124M": 124.4e6, "1B": 1.24e9, "8B": 8.03e9}  # parameters; a gradient in bf16 has 2 bytes
NODES = (2, 8, 64)
REFERENCE_GBPS = (10, 100, 400)  # shown where this host does not tell its rate
PINGS, CHUNK, CHUNKS, TIMEOUT_S = 300, 1 << 20, 128, 10.0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument(
        "--from",
        dest="recorded",
        type=Path,
        metavar="DIR",
        help="check a machine that detect_topology.py --record wrote into DIR",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, object]:
    args = parse_args(argv)
    machine = detect(args.recorded)
    found = findings(machine, source(args.recorded).root)
    run = script.start(__file__, args)
    loopback = measure_loopback() if args.recorded is None else None
    total = node_gbps(machine)
    if logs.env_rank() == 0:
        print(f"{machine.name}: best network {fabric(machine)}\n")
        for (verdict, text, consequence), topics in alike(found).items():
            print(f"{verdict:<10} {', '.join(topics)}: {text}\n{'':11}{consequence}")
            run.log(topics=topics, verdict=verdict, found=text)
        print("\n" + allreduce_table(machine, total))
        print("\n" + loopback_text(loopback))
    verdicts = [finding.verdict for finding in found]
    return {
        "machine": machine.name,
        "fabric": fabric(machine),
        "rdma_devices": sum(nic.rdma for nic in machine.nics),
        "rdma_active": sum(nic.rdma and nic.state == "active" for nic in machine.nics),
        "nic_gbps_max": max((n.rate_gbps for n in machine.nics if n.rate_gbps and n.state != "down"), default=None),
        "node_gbps": total,
        "gpudirect_rdma": machine.gpudirect,
        "ok": verdicts.count(OK),
        "attention": verdicts.count(ATTENTION),
        "absent": verdicts.count(ABSENT),
        "allreduce_8b_8_nodes_s_derived": ring_allreduce_seconds(2 * MODELS["8B"], 8, total) if total else None,
        **(loopback or {"loopback_rtt_us_p50": None, "loopback_gib_per_s": None}),
    }


def alike(found: list[Finding]) -> dict[tuple[str, str, str], list[str]]:
    """Topics by what was found on them: eight NICs in the same state are one line."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for finding in found:
        groups.setdefault((finding.verdict, finding.found, finding.consequence), []).append(finding.topic)
    return groups


def allreduce_table(machine: Machine, total_gbps: float | None) -> str:
    """Derived, not measured: 2 (N-1)/N x gradient bytes x 8 / rate, for N nodes."""
    lines = ["Time to all-reduce the gradients (bf16) over N nodes. Derived, not measured: a ring sends"]
    lines += ["2 (N-1)/N x parameters x 2 bytes from each node; no latency, links always full."]
    rates = [total_gbps] if total_gbps else REFERENCE_GBPS
    for gbps in rates:
        what = "the NICs that its GPUs use, together" if machine.gpus else "the fastest NIC of this host"
        what = what if total_gbps else "a reference: this host does not tell its rate"
        lines += ["", f"  at {gbps:g} Gb/s ({what})"]
        lines.append(f"  {'model':<12}{'gradient':>12}" + "".join(f"{f'N = {nodes}':>12}" for nodes in NODES))
        for name, parameters in MODELS.items():
            size = 2 * parameters
            times = "".join(f"{duration(ring_allreduce_seconds(size, n, gbps)):>12}" for n in NODES)
            lines.append(f"  {name:<12}{size / 2**30:>8.3f} GiB{times}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Three significant digits in the unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def measure_loopback() -> dict[str, float]:
    """A TCP connection to ourselves on 127.0.0.1: median round trip of 8 bytes, and the rate of 128 MiB one way."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)
        peer = threading.Thread(target=_echo_then_drain, args=(server,), daemon=True)
        peer.start()
        with socket.create_connection(server.getsockname(), timeout=TIMEOUT_S) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or small messages wait for one another
            trips = []
            for _ in range(PINGS):
                start = time.perf_counter()
                client.sendall(b"ping-pon")
                _receive(client, 8)
                trips.append(time.perf_counter() - start)
            chunk = bytes(CHUNK)
            start = time.perf_counter()
            for _ in range(CHUNKS):
                client.sendall(chunk)
            _receive(client, 8)  # the peer has it all
            seconds = time.perf_counter() - start
        peer.join(TIMEOUT_S)
    trips = trips[PINGS // 10 :]  # the first ones warm up
    return {
        "loopback_rtt_us_p50": round(statistics.median(trips) * 1e6, 1),
        "loopback_gib_per_s": round(CHUNK * CHUNKS / 2**30 / seconds, 2),
    }


def _echo_then_drain(server: socket.socket) -> None:
    with server.accept()[0] as connection:
        connection.settimeout(TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            connection.sendall(_receive(connection, 8))
        left, buffer = CHUNK * CHUNKS, memoryview(bytearray(CHUNK))
        while left:
            got = connection.recv_into(buffer)
            if not got:
                return
            left -= got
        connection.sendall(b"received")


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the loopback connection was closed")
        data += part
    return data


def loopback_text(loopback: dict[str, float] | None) -> str:
    if loopback is None:
        return "Loopback TCP: skipped, the machine is a recorded one (run without --from on the machine itself)"
    return (
        f"Loopback TCP on 127.0.0.1 (measured; the software's cost, not a network's): round trip "
        f"{loopback['loopback_rtt_us_p50']:g} us, {loopback['loopback_gib_per_s']:g} GiB/s one way"
    )


if __name__ == "__main__":
    script.run(main)

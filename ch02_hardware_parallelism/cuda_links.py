"""Measure the links of the GPUs: to the host, to each other, and to their own memory.

A repeat is as many copies back to back as take 20 ms, with one wait for all devices at its end: starting and waiting,
some microseconds, do not count. Every copy is compared with its source afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ch01_intro.topology import Machine
from ch02_hardware_parallelism.links import Port, Row, host_link, memory_gb_per_s, peer_link, peer_pairs
from common import profiling

REPEAT_S = 0.02
SWEEP = tuple(4**k * 2**12 for k in range(9))  # bytes: 4 KiB to 256 MiB


@dataclass
class Meter:
    """Times copies on some devices, and keeps what came out wrong."""

    repeats: int
    wrong: list[str] = field(default_factory=list)

    def rates(self, action: Callable[[], Any], nbytes: int, devices: Sequence[torch.device]) -> tuple[float, ...]:
        """GB/s of each repeat of `action`, which moves `nbytes` on these devices' streams."""

        def seconds(calls: int) -> float:
            wait(devices)
            begin = time.perf_counter()
            for _ in range(calls):
                action()
            wait(devices)
            return time.perf_counter() - begin

        seconds(2)  # warm up: contexts, peer access, page locks
        calls = max(1, min(1000, math.ceil(REPEAT_S / seconds(1))))
        return tuple(nbytes * calls / seconds(calls) / 1e9 for _ in range(self.repeats))

    def check(self, link: str, source: torch.Tensor, target: torch.Tensor) -> None:
        """Peer copies through an IOMMU that is set up wrong arrive without an error, as something else."""
        if not torch.equal(source.cpu(), target.cpu()):
            self.wrong.append(link)


def wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def numbers(size: int, device: torch.device | str, start: int = 0, *, pinned: bool = False) -> torch.Tensor:
    """`size` bytes that differ from place to place and from buffer to buffer."""
    made = torch.arange(start, start + size // 4, dtype=torch.int32, device=device)
    return made.pin_memory() if pinned else made


def port_of(device: torch.device, ports: Sequence[Port]) -> int | None:
    """The GPU's number in NVML and nvidia-smi, by its UUID: CUDA counts only visible ones, in an order of its own."""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "?"))
    return next((index for index, port in enumerate(ports) if uuid in port.uuid), None)


def host_rows(label: str, device: torch.device, size: int, kind: str, rate: float | None, meter: Meter) -> list[Row]:
    """Both ways, from pageable and from pinned memory; and both ways at once, each on a stream of its own."""
    rows = []
    for memory in ("pageable", "pinned"):
        host = numbers(size, "cpu", pinned=memory == "pinned")
        gpu = torch.empty_like(host, device=device)
        back = torch.empty_like(host, pin_memory=memory == "pinned")
        for name, target, source in ((f"host -> {label}", gpu, host), (f"{label} -> host", back, gpu)):
            rates = meter.rates(lambda t=target, s=source: t.copy_(s, non_blocking=True), size, [device])
            meter.check(f"{name}, {memory}", source, target)
            rows.append(Row(f"{name}, {memory}", kind, rates, rate))
    gpu_out = numbers(size, device, 7)  # the other buffers are the pinned ones, of the last turn
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            gpu.copy_(host, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            back.copy_(gpu_out, non_blocking=True)

    rates = meter.rates(both, 2 * size, [device])
    meter.check(f"host <-> {label}", gpu_out, back)
    rows.append(Row(f"host <-> {label}, pinned", kind, rates, rate and 2 * rate))
    return rows


def peer_rows(
    one: tuple[str, torch.device],
    two: tuple[str, torch.device],
    size: int,
    kind: str,
    rate: float | None,
    meter: Meter,
) -> list[Row]:
    """One way, and both at once. Without peer access the driver copies through the host: then no link is measured."""
    (label, here), (other_label, other) = one, two
    if not (torch.cuda.can_device_access_peer(here, other) and torch.cuda.can_device_access_peer(other, here)):
        kind, rate = f"through the host, no peer access ({kind})", None
    mine, theirs = numbers(size, here), numbers(size, other, 7)
    at_other, at_here = torch.empty_like(mine, device=other), torch.empty_like(theirs, device=here)
    forth, both_ways = f"{label} -> {other_label}", f"{label} <-> {other_label}"
    # A peer copy makes the current streams of both its devices wait for each other: each way needs a pair of its own.
    ways = [(torch.cuda.Stream(here), torch.cuda.Stream(other)) for _ in range(2)]

    def both() -> None:
        for (on_here, on_other), target, source in zip(ways, (at_other, at_here), (mine, theirs), strict=True):
            with torch.cuda.stream(on_here), torch.cuda.stream(on_other):
                target.copy_(source, non_blocking=True)

    rates = meter.rates(lambda: at_other.copy_(mine, non_blocking=True), size, [here, other])
    meter.check(forth, mine, at_other)
    rates_both = meter.rates(both, 2 * size, [here, other])
    meter.check(both_ways, theirs, at_here)
    return [Row(forth, kind, rates, rate), Row(both_ways, kind, rates_both, rate and 2 * rate)]


def memory_rows(label: str, device: torch.device, size: int, rate: float | None, meter: Meter) -> list[Row]:
    """Bytes read plus bytes written, as STREAM counts them."""
    x, y, z = (torch.ones(size // 4, device=device) for _ in range(3))
    copy = meter.rates(lambda: z.copy_(x), 2 * size, [device])
    triad = meter.rates(lambda: torch.add(x, y, alpha=3.0, out=z), 3 * size, [device])
    return [Row(f"{label} memory, copy", "device", copy, rate), Row(f"{label} memory, triad", "device", triad, rate)]


def sweep(devices: Sequence[torch.device], meter: Meter, largest: int) -> list[dict]:
    """Median GB/s by message size: host to the first GPU (pinned), and from there to the second."""
    curve = []
    for size in (size for size in SWEEP if size <= largest):
        host, gpu = numbers(size, "cpu", pinned=True), numbers(size, devices[0])
        pairs = {"h2d_gb_per_s": (gpu, host, devices[:1])}
        if len(devices) > 1:
            pairs["d2d_gb_per_s"] = (torch.empty_like(gpu, device=devices[1]), gpu, devices[:2])
        point: dict[str, float] = {"size_bytes": size}
        for name, (target, source, used) in pairs.items():
            rates = meter.rates(lambda t=target, s=source: t.copy_(s, non_blocking=True), size, used)
            point[name] = Row(name, "", rates).quartiles[1]
        curve.append(point)
    return curve


def measure(
    machine: Machine, ports: Sequence[Port], devices: Sequence[torch.device], size: int, meter: Meter
) -> list[Row]:
    """All rows of these GPUs. `size` is a buffer's; the arrays of the memory's own rows are four times as large."""
    indexes = [port_of(device, ports) for device in devices]
    labels = [f"cuda:{n}" if index is None else f"GPU{index}" for n, index in enumerate(indexes)]
    names = {gpu.index: gpu.name for gpu in machine.gpus}
    size = min(size, *(profiling.available_memory(device) // 16 for device in devices)) // 4 * 4
    rows: list[Row] = []
    for label, device, index in zip(labels, devices, indexes, strict=True):
        port = Port() if index is None else ports[index]
        kind, rate = host_link(None if index is None else names.get(index), port)
        rows += host_rows(label, device, size, kind, rate, meter)
        rows += memory_rows(label, device, 4 * size, memory_gb_per_s(port), meter)
    for a, b in peer_pairs(range(len(devices))):
        i, j = indexes[a], indexes[b]
        kind, rate = ("unknown path", None) if i is None or j is None else peer_link(machine, i, j, ports)
        rows += peer_rows((labels[a], devices[a]), (labels[b], devices[b]), size, kind, rate, meter)
    if len(devices) < 2:
        rows.append(Row("GPU <-> GPU", "NVLink or PCIe", skipped="one CUDA device is visible; needs two"))
    return rows

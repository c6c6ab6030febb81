"""What the links of a machine could carry, and a table of what they did carry. All rates are GB/s of 10^9 bytes.

Theoretical rates follow from what the topology (chapter 1) and NVML say: PCIe generation and width, the number of
NVLinks and the GPU that they belong to, memory clock and bus width. Where one of these is unknown, so is the rate.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ch01_intro.topology import Machine, NumaNode, nvlinks

# GT/s of a lane, and the share of the bits that carries data. PCI Express base specification: 8b/10b up to 2.0,
# 128b/130b up to 5.0, from 6.0 on 242 of a flit's 256 bytes.
PCIE = {1: (2.5, 0.8), 2: (5, 0.8), 3: (8, 128 / 130), 4: (16, 128 / 130), 5: (32, 128 / 130), 6: (64, 242 / 256)}
# GB/s of one NVLink, one way: each data sheet's total over all links and both ways, divided by 2 x its links.
NVLINK = (
    (r"\bG?B[123]00\b", 50.0),  # 1,800 GB/s by 18
    (r"\b(G?H[12]00|GH200)\b", 25.0),  # 900 by 18
    (r"\bA100\b", 25.0),  # 600 by 12
    (r"\bA30\b", 25.0),  # 200 by 4
    (r"\b(RTX A6000|A40|RTX 3090)\b", 14.0625),  # 112.5 by 4
    (r"\bV100\b", 25.0),  # 300 by 6
    (r"\bP100\b", 20.0),  # 160 by 4
)


@dataclass(frozen=True)
class Row:
    """One link: its name, what it is made of, the rate of each repeat, and what it could carry (None: unknown).

    skipped: why it was not measured.
    """

    link: str
    kind: str
    rates: tuple[float, ...] = ()
    theoretical: float | None = None
    skipped: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        p25, median, p75 = np.percentile(self.rates, [25, 50, 75]).tolist()
        return p25, median, p75

    @property
    def percent(self) -> float | None:
        return 100 * self.quartiles[1] / self.theoretical if self.theoretical and self.rates else None

    def as_json(self) -> dict:
        out: dict = {"link": self.link, "kind": self.kind, "theoretical_gb_per_s": self.theoretical}
        if not self.rates:
            return {**out, "skipped": self.skipped}
        names = ("p25_gb_per_s", "gb_per_s", "p75_gb_per_s")
        return {**out, **dict(zip(names, self.quartiles, strict=True)), "percent": self.percent}


@dataclass(frozen=True)
class Port:
    """What NVML says of one GPU's links to the host and to its own memory; None where it does not."""

    uuid: str = ""
    pcie_generation: int | None = None
    pcie_width: int | None = None
    memory_clock_mhz: int | None = None
    memory_bus_bits: int | None = None


def query_ports(nvml: Any) -> list[Port]:
    """A Port for each GPU in NVML's order, which is nvidia-smi's. Raises the module's NVMLError without a driver.

    The PCIe generation is the highest that GPU and slot have in common: at rest a GPU lowers the current one.
    """
    nvml.nvmlInit()
    try:
        return [_port(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _port(nvml: Any, handle: Any) -> Port:
    asked = {
        "uuid": lambda: nvml.nvmlDeviceGetUUID(handle),
        "pcie_generation": lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
        "pcie_width": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "memory_bus_bits": lambda: nvml.nvmlDeviceGetMemoryBusWidth(handle),
    }
    found: dict[str, Any] = {}
    for name, ask in asked.items():
        with contextlib.suppress(nvml.NVMLError):
            found[name] = ask()
    if isinstance(found.get("uuid"), bytes):  # older bindings
        found["uuid"] = found["uuid"].decode()
    return Port(**found)


def pcie_gb_per_s(generation: int | None, width: int | None) -> float | None:
    """GB/s of a PCIe link, one way, with the packets' headers: data alone cannot reach it."""
    if generation not in PCIE or not width:
        return None
    transfers, share = PCIE[generation]
    return transfers * share / 8 * width


def nvlink_gb_per_s(gpu_name: str | None, links: int) -> float | None:
    """GB/s of so many bonded NVLinks of that GPU, one way."""
    rate = next((rate for pattern, rate in NVLINK if re.search(pattern, gpu_name or "")), None)
    return rate * links if rate else None


def memory_gb_per_s(port: Port) -> float | None:
    """GB/s of a GPU's memory: two transfers a clock (DDR) over the whole bus."""
    if not port.memory_clock_mhz or not port.memory_bus_bits:
        return None
    return 2 * port.memory_clock_mhz * 1e6 * port.memory_bus_bits / 8 / 1e9


def host_link(gpu_name: str | None, port: Port) -> tuple[str, float | None]:
    """What joins the GPU and the host, and its GB/s one way. Grace's own link to its GPU is not PCIe: unknown."""
    if re.search(r"\bG[HB]\d", gpu_name or ""):
        return "NVLink-C2C", None
    rate = pcie_gb_per_s(port.pcie_generation, port.pcie_width)
    return (f"PCIe {port.pcie_generation}.0 x{port.pcie_width}" if rate else "PCIe"), rate


def peer_link(machine: Machine, i: int, j: int, ports: Sequence[Port]) -> tuple[str, float | None]:
    """What joins GPU i and GPU j (nvidia-smi's numbers), and its GB/s one way: the slower of the two ends on PCIe."""
    kind = machine.gpu_links().get((min(i, j), max(i, j)))
    if kind is None:
        return "unknown path", None
    names = {gpu.index: gpu.name for gpu in machine.gpus}
    if nvlinks(kind):
        return f"NVLink {kind}", nvlink_gb_per_s(names[i], nvlinks(kind))
    ends = [pcie_gb_per_s(p.pcie_generation, p.pcie_width) for p in (ports[i], ports[j])] if len(ports) > j else [None]
    known = [rate for rate in ends if rate]
    return f"PCIe {kind}", min(known) if len(known) == 2 else None


def peer_pairs(gpus: Sequence[int]) -> list[tuple[int, int]]:
    """Each pair of GPUs once; the reverse way is the same link."""
    return list(combinations(gpus, 2))


def numa_pairs(nodes: Sequence[NumaNode], usable: set[int]) -> list[tuple[NumaNode, NumaNode, str]]:
    """(cores of, memory of, why not): every pair of NUMA nodes, with the reason where it cannot be measured.

    Memory lands on the node whose core touches it first, so a node without usable cores cannot be filled that way.
    """
    reasons = {}
    for node in nodes:
        if not node.cpus:
            reasons[node.id] = f"node {node.id} has no cores to touch its memory first"
        elif not usable & set(node.cpus):
            reasons[node.id] = f"this process may not run on node {node.id}'s cores"
    return [(a, b, reasons.get(a.id, reasons.get(b.id, ""))) for a in nodes for b in nodes]


def text_table(rows: Sequence[Row]) -> str:
    """The table as printed. A percentage only where the theoretical rate is known."""
    names = max(len(row.link) for row in rows) + 2
    kinds = max(len(row.kind) for row in rows) + 2
    lines = [f"{'link':{names}}{'kind':{kinds}}{'GB/s':>9}{'quartiles':>19}{'theory':>10}{'percent':>9}"]
    for row in rows:
        head = f"{row.link:{names}}{row.kind:{kinds}}"
        if not row.rates:
            lines.append(f"{head}  skipped: {row.skipped}")
            continue
        p25, median, p75 = row.quartiles
        theory = f"{row.theoretical:10.1f}{row.percent:8.0f}%" if row.theoretical else f"{'unknown':>10}"
        lines.append(f"{head}{median:9.2f}{f'{p25:.2f} ... {p75:.2f}':>19}{theory}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A bar for each measured link, over a hollow one for what it could carry."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    shown = [row for row in rows if row.rates][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.32 * len(shown)), layout="constrained")
    theory = [row.theoretical or 0 for row in shown]
    axes.barh(range(len(shown)), theory, color="none", edgecolor="#888888", label="theoretical, where known")
    medians = [row.quartiles[1] for row in shown]
    spread = [[r.quartiles[1] - r.quartiles[0] for r in shown], [r.quartiles[2] - r.quartiles[1] for r in shown]]
    axes.barh(range(len(shown)), medians, height=0.5, xerr=spread, color="#1f5c99", label="measured, with quartiles")
    axes.set_yticks(range(len(shown)), [f"{row.link} ({row.kind})" for row in shown], fontsize=8)
    axes.set(xscale="log", xlabel="GB/s", xlim=(min(medians) / 4, 1.5 * max(medians + theory)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

"""NVML, the library below nvidia-smi: GPUs, the state of each NVLink, what its far end is, and PCIe paths.

API: NVIDIA's nvml.h as bound by nvidia-ml-py (`import pynvml`). The functions take the module as a parameter, so that
a recording or a test's stand-in can take its place, and the package needs no driver to be imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from common.script import UserError

from .model import parse_cpu_list
from .parse import pci_address

# nvmlGpuTopologyLevel_t → the words of `nvidia-smi topo -m`. INTERNAL is two GPUs on one board: one bridge.
ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
GPU_END, SWITCH_END = 0, 2  # nvmlIntNvLinkDeviceType_t
MAX_NVLINKS = 18  # of H100 and B200


@dataclass(frozen=True)
class NvLink:
    """One NVLink: is it up, and what is at its far end (a GPU's PCI address, or a switch)."""

    active: bool
    to_switch: bool = False
    remote_pci: str | None = None


@dataclass
class NvmlGpu:
    index: int
    name: str
    memory_mib: int | None
    pci: str
    cpus: tuple[int, ...] = ()
    nvlinks: list[NvLink] = field(default_factory=list)
    ancestors: dict[int, str] = field(default_factory=dict)  # the other GPU's index → PIX … SYS


def query(nvml: Any, cpu_count: int) -> list[NvmlGpu]:
    """Ask the driver. Raises the module's NVMLError if there is no driver; what a GPU lacks is left out."""
    nvml.nvmlInit()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return [_gpu(nvml, index, handles, cpu_count) for index in range(len(handles))]
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, handles: list[Any], cpu_count: int) -> NvmlGpu:
    handle, error = handles[index], nvml.NVMLError
    name = _text(nvml.nvmlDeviceGetName(handle))
    gpu = NvmlGpu(index, name, None, pci_address(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)))
    with contextlib.suppress(error):  # GPUs that share the CPU's memory do not have it
        gpu.memory_mib = nvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20
    with contextlib.suppress(error):
        words = nvml.nvmlDeviceGetCpuAffinity(handle, (cpu_count + 63) // 64)
        gpu.cpus = tuple(64 * n + bit for n, word in enumerate(words) for bit in range(64) if word >> bit & 1)
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", MAX_NVLINKS)):
        try:
            gpu.nvlinks.append(_nvlink(nvml, handle, link))
        except error:
            break  # no such link on this GPU
    for other, peer in enumerate(handles):
        if other != index:
            with contextlib.suppress(error, KeyError):
                gpu.ancestors[other] = ANCESTORS[nvml.nvmlDeviceGetTopologyCommonAncestor(handle, peer)]
    return gpu


def _nvlink(nvml: Any, handle: Any, link: int) -> NvLink:
    if not nvml.nvmlDeviceGetNvLinkState(handle, link):
        return NvLink(active=False)
    to_switch, remote = False, None
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        to_switch = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link) == SWITCH_END
    with contextlib.suppress(nvml.NVMLError, UserError):
        remote = pci_address(_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))
    return NvLink(True, to_switch, remote)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def uses_switch(gpus: list[NvmlGpu]) -> bool | None:
    """True if an active NVLink ends at a switch, False if all end at GPUs, None without an active link."""
    links = [link for gpu in gpus for link in gpu.nvlinks if link.active]
    return any(link.to_switch for link in links) if links else None


def gpu_links(gpus: list[NvmlGpu]) -> dict[tuple[str, str], str]:
    """The GPU–GPU part of the matrix: NV# where NVLinks join a pair (or both to the switch), else the PCIe path."""
    by_pci = {gpu.pci: gpu.index for gpu in gpus}
    direct = {gpu.index: Counter(by_pci[x.remote_pci] for x in gpu.nvlinks if x.remote_pci in by_pci) for gpu in gpus}
    switched = {gpu.index: sum(link.active and link.to_switch for link in gpu.nvlinks) for gpu in gpus}
    links = {}
    for n, a in enumerate(gpus):
        for b in gpus[n + 1 :]:
            count = direct[a.index][b.index] or min(switched[a.index], switched[b.index])
            kind = f"NV{count}" if count else a.ancestors.get(b.index)
            if kind:
                links[f"GPU{a.index}", f"GPU{b.index}"] = kind
    return links


def to_json(gpus: list[NvmlGpu]) -> str:
    return json.dumps([dataclasses.asdict(gpu) for gpu in gpus], indent=1)


def from_json(text: str, where: str = "nvml.json") -> list[NvmlGpu]:
    """A recording made by `to_json`. Raises UserError for anything else."""
    try:
        gpus = [NvmlGpu(**item) for item in json.loads(text)]
        for gpu in gpus:
            gpu.nvlinks = [NvLink(**link) for link in gpu.nvlinks]  # type: ignore[arg-type]
            gpu.ancestors = {int(other): kind for other, kind in gpu.ancestors.items()}
            gpu.cpus = parse_cpu_list(",".join(map(str, gpu.cpus)))
            if not set(gpu.ancestors.values()) <= set(ANCESTORS.values()) or not isinstance(gpu.index, int):
                raise ValueError("unknown link kind")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a recording of NVML ({error}); record the machine again with --record") from None
    return gpus

"""From sources to a `Machine`: the live one, or a folder that --record wrote. Every source may be missing.

A recorded machine is a folder with any of

    topo.txt                  nvidia-smi topo -m
    gpus.csv                  nvidia-smi --query-gpu=index,name,memory.total,pci.bus_id --format=csv,noheader,nounits
    nvml.json                 what NVML said (written by --record)
    lscpu.json or lscpu.txt   lscpu -J, or plain lscpu
    sys/ and proc/            the few kernel files that sysfs.FILES names
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from common import script
from common.script import UserError, atomic_write

from . import nvml, sysfs
from .model import Gpu, Machine, Nic, NumaNode, nvlinks
from .parse import TopoMatrix, parse_gpu_query, parse_lscpu, parse_topo

T = TypeVar("T")
TOPO = ["nvidia-smi", "topo", "-m"]
GPU_QUERY = ["nvidia-smi", "--query-gpu=index,name,memory.total,pci.bus_id", "--format=csv,noheader,nounits"]


class NotAvailable(Exception):
    """A source that this machine does not have, worded as the reason."""


class LiveMachine:
    """Sources of the machine that this process runs on."""

    name = "this machine"
    root = Path("/")

    def topo(self) -> str:
        return _output(TOPO)

    def gpu_query(self) -> str:
        return _output(GPU_QUERY)

    def lscpu(self) -> str:
        return _output(["lscpu", "-J"])

    def nvml(self) -> list[nvml.NvmlGpu]:
        try:
            module = importlib.import_module("pynvml")
        except ImportError:
            raise NotAvailable("nvidia-ml-py is not installed") from None
        try:
            return nvml.query(module, os.cpu_count() or 1)
        except module.NVMLError as error:
            raise NotAvailable(f"NVML: {error}") from None


class RecordedMachine:
    """Sources read from a folder. Raises UserError if the folder holds nothing that --record writes."""

    KNOWN = ("topo.txt", "gpus.csv", "nvml.json", "lscpu.json", "lscpu.txt", "sys", "proc")

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; pass one that detect_topology.py --record wrote")
        if not any((folder / name).exists() for name in self.KNOWN):
            raise UserError(f"{folder} holds none of {', '.join(self.KNOWN)}; write it with --record on that machine")
        self.root, self.name = folder, folder.resolve().name

    def _read(self, *names: str) -> str:
        for name in names:
            text = sysfs.read(self.root / name)
            if text is not None:
                return text
        raise NotAvailable(f"no {' or '.join(names)} in the folder")

    def topo(self) -> str:
        return self._read("topo.txt")

    def gpu_query(self) -> str:
        return self._read("gpus.csv")

    def lscpu(self) -> str:
        return self._read("lscpu.json", "lscpu.txt")

    def nvml(self) -> list[nvml.NvmlGpu]:
        return nvml.from_json(self._read("nvml.json"), f"{self.root}/nvml.json")


Source = LiveMachine | RecordedMachine


def _output(command: list[str]) -> str:
    """What a command prints, in English, or NotAvailable with its own first line."""
    if shutil.which(command[0]) is None:
        raise NotAvailable(f"{command[0]} is not installed")
    try:
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotAvailable(f"{' '.join(command[:2])} failed: {type(error).__name__}") from None
    text = done.stdout.decode("utf-8", errors="replace")
    if done.returncode != 0 or "No devices were found" in text:
        said = (text + done.stderr.decode("utf-8", errors="replace")).strip().splitlines()
        raise NotAvailable(f"{command[0]} exited with {done.returncode}: {said[0][:80] if said else 'no output'}")
    return text


def source(recorded: Path | None = None) -> Source:
    return RecordedMachine(recorded) if recorded is not None else LiveMachine()


def detect(recorded: Path | None = None) -> Machine:
    """The machine as a graph: the live one, or the one recorded in a folder.

    Raises UserError for a source that is there but cannot be read for certain, and when two sources contradict.
    """
    origin = source(recorded)
    machine = Machine(origin.name)

    def ask(name: str, fetch: Callable[[], T]) -> T | None:
        try:
            found = fetch()
        except NotAvailable as why:
            machine.sources[name] = f"not available: {why}"
            return None
        except UserError as why:
            if recorded is not None:
                raise
            # Here a tool prints what this code cannot read for certain; the other sources may still do.
            machine.sources[name] = f"not available: {str(why).split(';')[0]}"
            return None
        machine.sources[name] = "ok"
        return found

    at = "" if recorded is None else f"{recorded}/"
    matrix = ask("nvidia-smi topo", lambda: parse_topo(origin.topo(), f"{at}topo.txt"))
    names = ask("nvidia-smi query", lambda: parse_gpu_query(origin.gpu_query(), f"{at}gpus.csv"))
    driver = ask("nvml", origin.nvml)
    cpu = ask("lscpu", lambda: parse_lscpu(origin.lscpu(), f"{at}lscpu"))
    machine.numa_nodes = ask("sysfs", lambda: _numa_or_not(origin.root)) or []
    if recorded is not None and "ok" not in machine.sources.values():
        raise UserError(f"nothing in {recorded} can be read; write it again with --record on that machine")
    if cpu is not None:
        machine.cpu, nodes = cpu
        machine.numa_nodes = machine.numa_nodes or [NumaNode(node, cpus) for node, cpus in sorted(nodes.items())]
        if recorded is None and script.usable_cores() < machine.cpu.cpus:
            machine.notes.append(
                f"this process may use {script.usable_cores()} of {machine.cpu.cpus} CPUs (container or Slurm step): "
                "a binding to others fails; see taskset -cp $$"
            )
    _add_gpus(machine, matrix, names or {}, driver or [])
    _add_nics(machine, matrix, origin.root)
    machine.gpudirect = sysfs.gpudirect(origin.root) if machine.gpus else None
    machine.socket_interface = sysfs.default_interface(origin.root)
    machine.nvswitch = _nvswitch(machine, driver or [], sysfs.has_nvswitch(origin.root))
    return machine


def _numa_or_not(root: Path) -> list[NumaNode]:
    nodes = sysfs.numa_nodes(root)
    if not nodes and not (root / "sys/class/net").is_dir():
        raise NotAvailable("no sys/devices/system/node and no sys/class/net")
    return nodes


def _add_gpus(
    machine: Machine,
    matrix: TopoMatrix | None,
    names: dict[int, tuple[str, int | None, str]],
    driver: list[nvml.NvmlGpu],
) -> None:
    by_source = {
        "nvidia-smi topo": sorted(matrix.gpus) if matrix else [],
        "nvidia-smi query": sorted(names),
        "nvml": sorted(gpu.index for gpu in driver),
    }
    indexes = {name: found for name, found in by_source.items() if found}
    if len({tuple(found) for found in indexes.values()}) > 1:
        said = ", ".join(f"{name} has {len(found)}" for name, found in indexes.items())
        raise UserError(f"the sources see different GPUs ({said}); record the machine again in one go")
    for index in next(iter(indexes.values()), []):
        gpu = Gpu(index)
        for seen in (seen for seen in driver if seen.index == index):
            active = sum(link.active for link in seen.nvlinks)
            gpu = Gpu(index, seen.name, seen.memory_mib, seen.pci, None, seen.cpus, active, len(seen.nvlinks))
        if index in names:
            name, memory, pci = names[index]
            gpu = replace(gpu, name=name, memory_mib=memory, pci=pci)
        if matrix:
            gpu = replace(gpu, numa_node=matrix.numa.get(index), cpus=matrix.cpus.get(index, gpu.cpus))
        if gpu.numa_node is None and gpu.cpus:  # older drivers print CPUs only: the node that holds them all
            holders = [node.id for node in machine.numa_nodes if node.cpus and set(gpu.cpus) <= set(node.cpus)]
            gpu = replace(gpu, numa_node=holders[0] if len(holders) == 1 else None)
        gpu = replace(gpu, numa_node=_only_node(machine) if gpu.numa_node is None else gpu.numa_node)
        if gpu.numa_node is not None and machine.numa_nodes and machine.numa_of(gpu.numa_node) is None:
            raise UserError(
                f"GPU{index} is near NUMA node {gpu.numa_node}, which the kernel does not list; "
                "record the machine again in one go"
            )
        machine.gpus.append(gpu)
    machine.links.update(matrix.links if matrix else nvml.gpu_links(driver))
    for (a, b), kind in nvml.gpu_links(driver).items() if matrix else ():
        if nvlinks(kind) != nvlinks(machine.link(a, b)):
            machine.notes.append(f"nvidia-smi says {machine.link(a, b)} for {a}-{b}, NVML counts {kind}")


def _add_nics(machine: Machine, matrix: TopoMatrix | None, root: Path) -> None:
    """NICs of the kernel and of the matrix, joined by device name."""
    only = _only_node(machine)
    machine.nics = [replace(nic, numa_node=only) if nic.numa_node is None else nic for nic in sysfs.nics(root)]
    known = {nic.name for nic in machine.nics}
    for name in matrix.nics if matrix else []:
        if name not in known:
            kind = "efa" if name.startswith(("efa", "rdmap")) else "infiniband"
            machine.nics.append(Nic(name, kind))
            machine.notes.append(f"{name} is in the matrix only: its rate and state are unknown, RDMA is assumed")
    if matrix and not matrix.nics_named:
        machine.notes.append("the matrix names NICs by number and has no NIC legend: they cannot be joined with sysfs")


def _only_node(machine: Machine) -> int | None:
    """On a machine with one NUMA node every device is near it, also where a virtual machine does not say so."""
    return machine.numa_nodes[0].id if len(machine.numa_nodes) == 1 else None


def _nvswitch(machine: Machine, driver: list[nvml.NvmlGpu], on_pci: bool) -> bool | None:
    """True or False where it can be told, else None.

    From the matrix alone: each of n GPUs would need (n-1) x # plugs without a switch, and a GPU has at most 18.
    """
    if on_pci or not machine.gpus:
        return on_pci
    if (told := nvml.uses_switch(driver)) is not None:
        return told
    per_gpu = [
        sum(nvlinks(machine.link(gpu.label, other.label)) for other in machine.gpus if other is not gpu)
        for gpu in machine.gpus
    ]
    if len(machine.gpus) == 1:
        return None
    if not any(per_gpu):
        return False
    if min(per_gpu) > nvml.MAX_NVLINKS:
        return True
    uneven = len({nvlinks(kind) for kind in machine.gpu_links().values()}) > 1
    return False if uneven else None  # a switch joins every pair alike; an even small mesh could be either


def record(folder: Path) -> dict[str, str]:
    """Write this machine's sources into a new folder; what each one gave. Raises UserError if the folder has files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty; pass --record a new folder")
    live = LiveMachine()
    fetchers = {
        "topo.txt": live.topo,
        "gpus.csv": live.gpu_query,
        "nvml.json": lambda: nvml.to_json(live.nvml()),
        "lscpu.json": live.lscpu,
    }
    written = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, fetch in fetchers.items():
            try:
                text = fetch()
            except NotAvailable as why:
                written[name] = f"not available: {why}"
                continue
            with atomic_write(folder / name) as file:
                file.write(text)
            written[name] = "ok"
        written["sys, proc"] = f"{sysfs.record(folder)} files"
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); pass --record another folder") from None
    return written

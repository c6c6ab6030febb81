"""Measure the links of the host: its memory, with all threads and from node to node, and what joins its processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ch01_intro.topology import Machine
from ch02_hardware_parallelism import process_links
from ch02_hardware_parallelism.links import Row, numa_pairs
from common import profiling, script

NODE_BYTES = 64 * 2**20  # of each thread's array in the NUMA matrix
NODE_THREADS = 16
MESSAGE_BYTES = 64 * 2**20


def cache_bytes(root: Path = Path("/")) -> int:
    """All last-level caches of the machine together, each counted once; 0 where the kernel does not tell."""
    found: dict[str, int] = {}
    for level in (4, 3, 2):
        for cache in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*/level"):
            if cache.read_text().strip() == str(level):
                size = (cache.parent / "size").read_text().strip()  # 32768K
                found[(cache.parent / "shared_cpu_list").read_text()] = int(size.rstrip("K")) * 2**10
        if found:
            break
    return sum(found.values())


def array_bytes() -> int:
    """Of each array: four times the caches, as STREAM asks for, 256 MiB at least, and an eighth of what is free."""
    free = profiling.available_memory(torch.device("cpu"))
    return min(max(2**28, 4 * cache_bytes()), free // 8) // 4096 * 4096


def memory_rows(size: int, repeats: int) -> list[Row]:
    """STREAM's copy and triad with all threads (McCalpin, 1995): bytes read plus bytes written, as STREAM counts.

    A cache line that is written may have to be read first: that traffic is not counted. What the DRAM could carry
    depends on how many channels are filled, which only firmware tables tell (dmidecode, as root): unknown here.
    """
    x, y, z = (torch.ones(size // 4) for _ in range(3))
    rows = []
    for name, arrays, action in (
        ("copy", 2, lambda: z.copy_(x)),
        ("triad", 3, lambda: torch.add(x, y, alpha=3.0, out=z)),
    ):
        rates = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            action()
            rates.append(arrays * x.nbytes / (time.perf_counter() - begin) / 1e9)
        rows.append(Row(f"host memory, {name}", f"DRAM, {torch.get_num_threads()} threads", tuple(rates[1:])))
    return rows


def numa_rows(machine: Machine, repeats: int) -> list[Row]:
    """Copy, by the cores of each node in the memory of each node."""
    if len(machine.numa_nodes) < 2:
        return [Row("node -> node", "NUMA", skipped="this machine has one NUMA node")]
    usable = os.sched_getaffinity(0)
    rows = []
    for cores, memory, reason in numa_pairs(machine.numa_nodes, usable):
        name, distance = f"cores {cores.id}, memory {memory.id}", cores.distances.get(memory.id)
        kind = f"NUMA, distance {distance}" if distance else "NUMA"
        if reason:
            rows.append(Row(name, kind, skipped=reason))
            continue
        on = {node.id: sorted(usable & set(node.cpus)) for node in (cores, memory)}
        rows.append(Row(name, kind, node_rates(on[cores.id], on[memory.id], repeats)))
    return rows


def node_rates(
    cores: Sequence[int], touchers: Sequence[int], repeats: int, size: int = NODE_BYTES
) -> tuple[float, ...]:
    """GB/s read plus written by threads on `cores`, in memory that threads on `touchers` touched first.

    Linux places a page on the node of the core that first writes to it, and an affinity is each thread's own.
    """
    count = min(len(cores), NODE_THREADS)
    gate = threading.Barrier(count + 1)

    def work(number: int) -> None:
        os.sched_setaffinity(0, {touchers[number % len(touchers)]})
        source, target = (np.ones(size, dtype=np.uint8) for _ in range(2))
        os.sched_setaffinity(0, {cores[number]})
        for _ in range(repeats + 1):
            gate.wait(60)
            np.copyto(target, source)  # without the interpreter's lock
            gate.wait(60)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    rates = []
    for _ in range(repeats + 1):
        gate.wait(60)
        begin = time.perf_counter()
        gate.wait(60)
        rates.append(2 * count * size / (time.perf_counter() - begin) / 1e9)
    for thread in threads:
        thread.join()
    return tuple(rates[1:])


def process_rows(repeats: int, wrong: list[str], size: int = MESSAGE_BYTES) -> list[Row]:
    """What one process hands to another: a copy in and a copy out, or a stream through the kernel."""
    kinds = {"shared memory": "copy in, copy out", "loopback TCP": "one stream"}
    rates = process_links.measure(size, repeats, wrong)
    return [Row(f"process -> process, {name}", kinds[name], tuple(values)) for name, values in rates.items()]


def measure(machine: Machine, repeats: int, wrong: list[str], size: int | None = None) -> list[Row]:
    """All rows of the host. `size`: bytes of each array in its memory, None for array_bytes().

    The links over which something else arrived than what was sent are added to `wrong`.

    Raises:
        UserError: there is too little memory for the arrays.
    """
    size, free = size or array_bytes(), profiling.available_memory(torch.device("cpu"))
    if not 2**20 <= size <= free // 4:
        raise script.UserError(
            f"three arrays of {size / 2**20:.0f} MiB do not go into {free / 2**20:.0f} MiB of free memory; pass a "
            "smaller --host-mib, or free some"
        )
    return [*memory_rows(size, repeats), *numa_rows(machine, repeats), *process_rows(repeats, wrong)]

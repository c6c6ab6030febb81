"""A real limit on what a rank may hold: beyond it an allocation is refused, as by a device that is full.

GPU  the share of the device's memory that torch's caching allocator may take
CPU  RLIMIT_DATA (man 2 getrlimit, Linux 4.7 and later): the private writable memory of this process, which is its heap,
     its tensors and its threads' stacks. What a file backs is not counted: the kernel can take those pages back at any
     time, and so they are no demand for memory.
"""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from ch04_fsdp import resident
from common import profiling
from common.script import UserError


@contextlib.contextmanager
def limited(cap_bytes: float | None, device: torch.device) -> Iterator[None]:
    """In this block the process gets `cap_bytes` more than it has; what it frees it can have again. None: no limit.

    Afterwards, also after an error, there is none: to end in good order takes memory too (a thread's stack is 8 MiB).

    Raises:
        UserError: the device has less than that, or this is no Linux.
    """
    if cap_bytes is None:
        yield
    elif device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        wanted = cap_bytes + torch.cuda.memory_reserved(device)
        if wanted > total:
            raise UserError(
                f"a cap of {cap_bytes / 2**30:.2f} GiB is no limit on a device of {total / 2**30:.1f} GiB; lower it"
            )
        torch.cuda.set_per_process_memory_fraction(wanted / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    elif sys.platform.startswith("linux"):
        total = psutil.virtual_memory().total
        if cap_bytes > total:
            raise UserError(
                f"a cap of {cap_bytes / 2**30:.2f} GiB is no limit on a machine of {total / 2**30:.1f} GiB; lower it"
            )
        resident.return_at_once()
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + int(cap_bytes), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)
    else:
        raise UserError("a memory cap on a CPU needs Linux (RLIMIT_DATA); run this there or in a container")


def private_bytes() -> int:
    """What RLIMIT_DATA is compared with: VmData of /proc/self/status."""
    found = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


class Peak:
    """The most memory that is taken from here on, beyond what there was; on a CPU resident pages, also a file's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        profiling.reset_peak_memory(device)
        self.before = profiling.memory(device).current

    def bytes(self) -> int:
        return profiling.memory(self.device).peak - self.before

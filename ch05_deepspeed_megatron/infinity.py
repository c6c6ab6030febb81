"""ZeRO-Infinity (arXiv:2104.07857): what offload to a disk leaves in a rank's memory, and what it puts into files.

    place = infinity.place(shapes_of(config), settings, ranks=2, dtype=torch.float32)
    place.memory, place.disk, place.pinned       ->  bytes of one rank

A rank's share of a parameter lies in a file of its own, and comes into one of `buffer_count` pinned buffers when its
layer is near. The optimizer goes through its shares by sub-groups: one sub-group's weights, gradients and two means
fill its buffers, are stepped on, and go back. In memory stay:

    gradients          all of the rank's shares, from backward to the step
    parameter buffers  buffer_count x buffer_size, and one sub-group's weights on their way back
    optimizer buffers  4 x the largest sub-group
    whatever is small  below 1 MiB (or aio.block_size, if that is more) nothing goes to the disk at all

The last line is a trap: a share of 500 kB stays in memory, and so does a sub-group, whatever the config says. So does
everything in a model of one sub-group, which sub_group_size makes of most models by default (1e9 elements).
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ch04_fsdp import offload_folder, weights
from common.dist import Launch
from common.script import UserError

LEAST_IN_A_FILE = 2**20  # bytes; DeepSpeed's MIN_AIO_BYTES
ALIGNMENT = 1024  # bytes, for each thread of a request; its AIO_ALIGNED_BYTES
CAP_IPC_LOCK = 1 << 14  # capabilities(7): may lock as much memory as there is
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Bytes of one rank, float32 master weights and Adam: between backward and the step."""

    gradients: int
    weights_in_memory: int  # shares too small for a file, or all of them
    optimizer_in_memory: int  # sub-groups too small, with their gradients: or all of them
    pinned: int  # the buffers
    weights_on_disk: int
    optimizer_on_disk: int

    @property
    def memory(self) -> int:
        return self.gradients + self.weights_in_memory + self.optimizer_in_memory + self.pinned

    @property
    def disk(self) -> int:
        return self.weights_on_disk + self.optimizer_on_disk


def shapes_of(config: Any) -> list[torch.Size]:
    """Of a model's parameters, in their order, a tied one once. Nothing is allocated."""
    return [parameter.shape for parameter in weights.plan(config).parameters()]


def place(shapes: Sequence[torch.Size], settings: Settings, *, ranks: int, dtype: torch.dtype) -> Place:
    """What stage 3 holds where, with or without offload.

    Args:
        dtype: of weights and gradients; the optimizer has a float32 copy of them, also of float32 ones.
    """
    zero, aio = settings["zero_optimization"], settings.get("aio", {})
    size, moments = dtype.itemsize, 8
    least = max(LEAST_IN_A_FILE, aio.get("block_size", 2**20))
    grain = ALIGNMENT * aio.get("intra_op_parallelism", 1)
    to_disk = {what: (zero.get(f"offload_{what}") or {}).get("device") == "nvme" for what in ("param", "optimizer")}
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"

    def aligned(numbers: int, width: int) -> int:
        """Bytes, as they are read and written."""
        return math.ceil(numbers * width / grain) * grain

    shares = [math.ceil(shape.numel() / ranks) for shape in shapes]
    filed = [to_disk["param"] and share * size >= least for share in shares]
    groups = list(_sub_groups(shapes, shares, zero.get("sub_group_size", 10**9)))
    swapped = [to_disk["optimizer"] and 4 * sum(group) >= least for group in groups]
    master, own_gradient = 4, 4 if offloaded else 0
    stay = sum(sum(group) for group, gone in zip(groups, swapped, strict=True) if not gone)
    pinned = 0
    if to_disk["param"]:
        buffers = zero["offload_param"]
        pinned += buffers.get("buffer_count", 5) * aligned(buffers.get("buffer_size", 10**8), size)
        pinned += sum(aligned(share, size) for share in max(groups, key=sum))
    if to_disk["optimizer"]:
        pinned += zero["offload_optimizer"].get("buffer_count", 4) * aligned(max(map(sum, groups)), 4)
    return Place(
        gradients=size * sum(shares),
        weights_in_memory=size * sum(share for share, gone in zip(shares, filed, strict=True) if not gone),
        optimizer_in_memory=(master + moments + own_gradient) * stay,
        pinned=pinned,
        weights_on_disk=sum(aligned(share, size) for share, gone in zip(shares, filed, strict=True) if gone),
        optimizer_on_disk=sum(
            3 * aligned(sum(group), 4) + (_gradient_files(group, least, grain) if dtype == torch.float32 else 0)
            for group, gone in zip(groups, swapped, strict=True) if gone
        ),
    )  # fmt: skip


def _sub_groups(shapes: Sequence[torch.Size], shares: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Shares that the optimizer steps on together: matrices, then vectors, closed when there are `limit` numbers."""
    for matrices in (True, False):
        group: list[int] = []
        for shape, share in zip(shapes, shares, strict=True):
            if (len(shape) >= 2) == matrices:
                group.append(share)
                if sum(group) >= limit:
                    yield group
                    group = []
        if group:
            yield group


def _gradient_files(group: Sequence[int], least: int, grain: int) -> int:
    """Gradients that are large enough for a file; what does not divide by the grain stays in memory."""
    whole = [4 * share // grain * grain for share in group]
    return sum(part for part in whole if part >= least)


def check_direct(folder: Path) -> None:
    """
    Raises:
        UserError: the file system has no O_DIRECT, which DeepSpeed opens its files with.
    """
    probe = folder / f".direct-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        raise UserError(
            f"{folder} ({offload_folder.kind(folder)}) has no direct I/O ({error.strerror}), which DeepSpeed's offload "
            "needs; pass --nvme-dir on a disk with ext4 or xfs"
        ) from None
    finally:
        probe.unlink(missing_ok=True)


def check_pinned(needed: int) -> None:
    """DeepSpeed ends in a crash where the kernel refuses to lock pages.

    Raises:
        UserError: more bytes than this user may lock.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and needed > limit and not _may_lock_all():
        raise UserError(
            f"the offload buffers pin {needed / 2**20:.0f} MiB, and this user may lock {limit / 2**20:.0f} MiB; raise "
            "that (ulimit -l unlimited, or memlock in limits.conf), or lower buffer_count and sub_group_size"
        )


def _may_lock_all() -> bool:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return bool(int(next(line.split()[1] for line in lines if line.startswith("CapEff")), 16) & CAP_IPC_LOCK)
    return False


def folder_for(disk: Path, launch: Launch) -> Path:
    """A job's own folder on the disk: DeepSpeed empties what it finds there. This rank's part goes when it ends.

    Raises:
        UserError: there is no such disk, or it cannot be written to.
    """
    if not disk.is_dir():
        raise UserError(f"no folder {disk}; make it on the disk to offload to, or pass another --nvme-dir")
    name = os.getpid() if launch.launcher == "python" else f"{launch.address}-{launch.port}"
    folder = disk / f"deepspeed-{name}"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {disk} ({error.strerror}); pass another --nvme-dir") from None
    check_direct(folder)
    atexit.register(_leave, folder, launch.rank)
    return folder


def _leave(folder: Path, rank: int) -> None:
    for own in [*folder.glob(f"**/rank{rank}"), folder / "none"]:
        shutil.rmtree(own, ignore_errors=True)
        for parent in [parent for parent in own.parents if parent.is_relative_to(folder)]:
            with contextlib.suppress(OSError):  # another rank's part is still there
                parent.rmdir()

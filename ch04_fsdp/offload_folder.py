"""The folder that the disk tier's file goes to: is it there, is it a disk, has it room; and the file itself, mapped."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO

import psutil

from common.logs import get_logger
from common.script import UserError

log = get_logger()
IN_MEMORY = ("tmpfs", "ramfs")  # file systems that are memory themselves


def mapped(folder: Path, size: int) -> tuple[IO[bytes], mmap.mmap]:
    """A file without a name, of zeros: it is gone with this process, in whatever way that ends.

    Its room is taken now: a write through a mapping that finds the disk full later kills the process (SIGBUS).
    """
    if not sys.platform.startswith("linux"):
        raise UserError("offload to a disk needs Linux (fallocate, madvise); take --offload cpu")
    try:
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(
                f"{folder} has {free / 2**30:.2f} GiB free, this rank's shards and optimizer state take "
                f"{size / 2**30:.2f} GiB; make room or pass another --offload-dir"
            )
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the tier)
        os.posix_fallocate(file.fileno(), 0, size)
        pages = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UserError(f"cannot offload to {folder} ({error.strerror}); pass another --offload-dir") from None
    return file, pages


def kind(folder: Path) -> str:
    """The file system that a folder lies on, as in ext4, nfs4 or tmpfs (which is memory, and no disk at all)."""
    parents = [folder.resolve(), *folder.resolve().parents]
    found = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((found[parent] for parent in parents if parent in found), "unknown")


def existing(text: str) -> Path:
    """argparse type of --offload-dir. It must be there: a disk that is not mounted is not to be taken for another.

    Raises:
        UserError: it is not there, or no folder.
    """
    if not Path(text).is_dir():
        raise UserError(f"no folder {text}; make it on the disk to offload to, or pass another --offload-dir")
    return Path(text)


def chosen(by_user: Path | None, run_folder: Path) -> Path:
    """Where to offload to: what the user chose, else the run's; with a warning where that is no disk."""
    folder = by_user or run_folder
    if (found := kind(folder)) in IN_MEMORY:
        log.warning(f"{folder} is on {found}, which is memory and no disk: pass --offload-dir on a disk")
    return folder

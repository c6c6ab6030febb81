"""DeepSpeed's compiled operators: which of them a config needs, whether they can be compiled here, and compiling them.

    ops.build(ops.needed(settings), device)     # before ranks meet: a compiler takes half a minute, a rank waits less

DeepSpeed compiles an operator where it is first used (JIT), by torch's loader, into TORCH_EXTENSIONS_DIR, where the
next run finds it. That loader marks a folder that is in work by a file; one left by a killed process makes all others
wait for good. Here the kernel keeps the mark (flock), and takes it away when a process ends. And the compiler runs in
a process tree of its own, which ends with its starter, in whatever way that ends: ninja by itself would go on, and the
next one compile into the same files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ch04_fsdp import zero_peers
from common import exercises, process
from common.logs import get_logger
from common.script import UserError

log = get_logger()
ADAM, AIO = "CPUAdamBuilder", "AsyncIOBuilder"
# In a process of its own; deepspeed finds by DS_ACCELERATOR what to compile for. Without its -g: a debugger's tables of
# all that torch's headers declare, again for each of ten files, are a good part of the minutes.
COMPILE = """
import sys
from deepspeed.ops import op_builder
builder = getattr(op_builder, sys.argv[1])()
flags = builder.cxx_args()
builder.cxx_args = lambda: [*flags, "-g0"]
builder.load(verbose=False)
"""
WHAT_FOR = {ADAM: "the optimizer on the CPU (DeepSpeedCPUAdam)", AIO: "offload to a disk (libaio)"}


def needed(settings: Mapping[str, Any]) -> list[str]:
    """Names in deepspeed.ops.op_builder of what the config's offloads use."""
    zero, optimizer = settings.get("zero_optimization", {}), settings.get("optimizer", {})
    devices = [(zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param")]
    on_cpu = devices[0] != "none" and not optimizer.get("params", {}).get("torch_adam")
    return [ADAM] * on_cpu + [AIO] * ("nvme" in devices)


def check(names: Iterable[str], device: torch.device) -> None:
    """
    Raises:
        UserError: this machine cannot compile one of them.
    """
    for name in names:
        lacking = exercises.missing_for("aio") if name == AIO else _compiler_missing()
        if not lacking and device.type == "cuda":
            from torch.utils.cpp_extension import CUDA_HOME

            lacking = "" if CUDA_HOME else "the CUDA toolkit (install it, or set CUDA_HOME)"
        if lacking:
            raise UserError(f"DeepSpeed compiles {WHAT_FOR[name]} here, and needs for it {lacking}")


def _compiler_missing() -> str:
    return "" if shutil.which(os.environ.get("CXX", "c++")) else "g++ (make system-deps)"


def build(names: Iterable[str], device: torch.device, timeout_s: float = 600) -> None:
    """Compile them, or load what is compiled already. Each rank calls it; they take turns.

    Raises:
        UserError: something is missing, does not compile, or another process compiles for longer than timeout_s.
    """
    names = list(names)
    check(names, device)
    if not names:
        return
    zero_peers.library(device)
    from deepspeed.ops import op_builder

    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    with _alone_in(folder, timeout_s), contextlib.redirect_stdout(sys.stderr):
        for mark in folder.glob("*/lock"):  # torch's: nobody is at work here
            mark.unlink(missing_ok=True)
        for name in names:
            builder = getattr(op_builder, name)()
            if not (folder / builder.name / f"{builder.name}.so").exists():
                log.info(f"compiling {WHAT_FOR[name]}, once")
                done = process.run([sys.executable, "-c", COMPILE, name], timeout_s=timeout_s)
                if done.returncode:
                    why = done.reason(timeout_s)[:200]
                    raise UserError(f"cannot compile {WHAT_FOR[name]} ({why}); see `make system-deps`")
            builder.load(verbose=False)


@contextlib.contextmanager
def _alone_in(folder: Path, timeout_s: float) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".building").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); set TORCH_EXTENSIONS_DIR") from None
    with file:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process has been compiling in {folder} for {timeout_s:.0f} s; end it, or set "
                        "TORCH_EXTENSIONS_DIR to another folder"
                    ) from None
                time.sleep(0.1)
        yield

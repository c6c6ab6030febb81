"""Endings that leave nothing: by a signal, and by SIGKILL, after which a process can clear up nothing itself."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# It learns of its starter's end by the pipe, and clears up what is left by then.
GUARD = """
import os, shutil, subprocess, sys, time
sys.stdin.read()
if sys.argv[2:]:
    subprocess.run(sys.argv[2:], capture_output=True)
for _ in range(300):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.1)
"""


@contextlib.contextmanager
def folder_guard(folder: Path, *command: str) -> Iterator[None]:
    """Whatever ends this process, the folder goes, after `command` was run."""
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, str(folder), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.communicate()


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, once: what is cleared away then is not interrupted again."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(*_: object) -> None:
        for kind in kinds:
            signal.signal(kind, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {kind: signal.signal(kind, interrupt) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)

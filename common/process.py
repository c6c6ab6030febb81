"""Run a command to its end: output kept, RESULT line parsed, a timeout, and nothing left running afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).resolve().parent.parent

# Beside each Child: it reads a pipe whose other end only the starter has, and so learns of its end, be it by SIGKILL.
GUARD = """
import sys
sys.stdin.read()
sys.path.insert(0, sys.argv[2])
from common.process import kill_marked
kill_marked(sys.argv[1])
"""


@dataclass(frozen=True)
class Finished:
    """returncode is negative for a signal, as in subprocess. timed_out: it was stopped at its limit."""

    command: Sequence[str]
    returncode: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool

    @property
    def result(self) -> dict[str, Any] | None:
        """The RESULT object, None unless it is the last line of stdout."""
        lines = self.stdout.rstrip().splitlines()
        if not lines or not lines[-1].startswith("RESULT "):
            return None
        try:
            value = json.loads(lines[-1][len("RESULT ") :])
        except json.JSONDecodeError:
            return None
        return value if isinstance(value, dict) else None

    def reason(self, timeout_s: float | None = None) -> str:
        """Why it failed, in one line: the last error on stderr, a signal, or the timeout."""
        if self.timed_out:
            return f"stopped after {timeout_s or self.seconds:.0f} s"
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("error:", "error ["))]  # not torchrun's error_file
        told = told or [line for line in lines if "Error" in line]
        last = (told or lines or ["no output"])[-1]
        return f"exit {self.returncode}: {last[:300]}"


def marked(mark: str) -> set[psutil.Process]:
    """The living processes that were started with a variable of this name."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def kill_marked(mark: str) -> None:
    """SIGKILL them all, and again: one that is being born has no variables of its own before its exec."""
    quiet = 0
    while quiet < 3:
        alive = marked(mark)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        quiet = 0 if alive else quiet + 1
        time.sleep(0.05)


class Child:
    """A running command whose whole process tree is stopped when the `with` block is left, in whatever way.

    When the starter itself is killed and can stop nothing, a guard does it. The tree is known by a variable that all of
    it inherits: processes whose parent has ended belong to it as well as those in sessions of their own. `on_line` is
    called with each line of stdout, `on_error` with each of stderr, from threads. With `stdin` it has one to write to.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        on_line: Callable[[str], None] | None = None,
        on_error: Callable[[str], None] | None = None,
        stdin: bool = False,
    ) -> None:
        self.command = shlex.split(command) if isinstance(command, str) else [str(part) for part in command]
        path = (
            f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # this venv's python and torchrun
        )
        self._mark = f"CHILD_{uuid.uuid4().hex}"  # its own name: a Child may start others
        self._guard = subprocess.Popen(
            [sys.executable, "-c", GUARD, self._mark, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=cwd,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **(env or {}), self._mark: "1"},
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us alone: we decide in what order things stop
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            self._read(self.process.stdout, self.out, on_line),
            self._read(self.process.stderr, self.err, on_error),
        ]

    @staticmethod
    def _read(pipe: IO[str] | None, into: list[str], on_line: Callable[[str], None] | None = None) -> threading.Thread:
        assert pipe is not None

        def loop() -> None:
            for line in pipe:
                into.append(line)
                if on_line:
                    on_line(line.rstrip("\n"))

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        return thread

    def wait(self, timeout_s: float) -> Finished:
        """Wait for the end; at the limit, stop the whole tree."""
        timed_out = False
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        self.stop()  # also after a good end: a grandchild that outlives its parent would hold the pipes open
        for reader in self._readers:
            reader.join(5)
        seconds = time.monotonic() - self.started
        out, err = "".join(self.out), "".join(self.err)
        return Finished(self.command, self.process.returncode, out, err, seconds, timed_out)

    def tree(self) -> list[psutil.Process]:
        """The process and all its descendants that live now, also those that were left behind by their parents."""
        found: set[psutil.Process] = set()
        if self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(self.process.pid)
                found = {parent, *parent.children(recursive=True)}
        return list(found | marked(self._mark))

    def kill(self) -> None:
        """SIGKILL the whole tree at once, as a power cut or the out-of-memory killer would."""
        for _ in range(5):  # again, for those that were being born
            alive = self.tree()
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            # Before psutil does: it would take the exit status away. An interrupt inside Popen.wait can leave its lock
            # held, so that it never returns again: the process is gone all the same, and nobody asks for its status.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            psutil.wait_procs(alive, timeout=5)
            if not alive:
                break

    def stop(self, grace_s: float = 10) -> None:
        """SIGTERM to the process, then to what it left behind, then SIGKILL for what is still there."""
        if self.process.poll() is None:
            self.process.terminate()  # torchrun and other parents stop their own children in order
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        if left := [process for process in self.tree() if process.pid != self.process.pid]:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
            psutil.wait_procs(left, timeout=1)
        self.kill()
        self._guard.kill()
        self._guard.communicate()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run(
    command: str | Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    on_error: Callable[[str], None] | None = None,
) -> Finished:
    """Run `command` from the repository's root with this venv first on PATH."""
    with Child(command, env=env, on_line=on_line, on_error=on_error) as child:
        return child.wait(timeout_s)

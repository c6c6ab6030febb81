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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


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
        told = [line for line in lines if line.startswith("error")] or [line for line in lines if "Error" in line]
        last = (told or lines or ["no output"])[-1]
        return f"exit {self.returncode}: {last[:300]}"


class Child:
    """A running command whose whole process tree is stopped when the `with` block is left, in whatever way.

    `on_line` is called with each line of stdout, `on_error` with each of stderr, from threads.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        on_line: Callable[[str], None] | None = None,
        on_error: Callable[[str], None] | None = None,
    ) -> None:
        self.command = shlex.split(command) if isinstance(command, str) else [str(part) for part in command]
        path = (
            f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # this venv's python and torchrun
        )
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=cwd,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
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
            self.stop()
        for reader in self._readers:
            reader.join(5)  # a grandchild that outlives its parent may hold the pipe open
        seconds = time.monotonic() - self.started
        out, err = "".join(self.out), "".join(self.err)
        return Finished(self.command, self.process.returncode, out, err, seconds, timed_out)

    def tree(self) -> list[psutil.Process]:
        """The process and all its descendants that live now."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL the whole tree at once, as a power cut or the out-of-memory killer would."""
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)

    def stop(self, grace_s: float = 10) -> None:
        """SIGTERM, then SIGKILL for what is left. By tree: torchrun puts its workers into sessions of their own."""
        tree = self.tree()
        if self.process.poll() is None:
            self.process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=grace_s if self.process.poll() is None else 1)
        for process in {*alive, *self.tree()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
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

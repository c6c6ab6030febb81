"""A process that answers one question at a time, in the environment of the engine that it drives; idle between them.

Questions and answers are lines of JSON on its stdin and stdout. Its side is answer.py.
"""

from __future__ import annotations

import json
import queue
import sys
import time
from typing import Any

from ch06_vllm import servers
from common import process
from common.script import UserError


class Process:
    """
    Args:
        name: what it is called in errors.
        call: "module:function" that it calls with `arguments`, all of them strings.
        engine: whose Python it runs on: "vllm", or any other for this one's.
    """

    def __init__(self, name: str, call: str, *arguments: str, engine: str = "vllm") -> None:
        self.name = name
        python, env = sys.executable, {}
        if engine == "vllm":
            python, env = str(servers.vllm_program("python")), servers.vllm_environment(1)
            env["VLLM_CPU_OMP_THREADS_BIND"] = servers.cores_of_ranks(servers.own_cores(), 1)  # all: no server beside
        module, _, function = call.partition(":")
        start = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
        self._lines: queue.Queue[str] = queue.Queue()
        self.child = process.Child(
            [python, "-c", start, *arguments],
            env={**env, "PYTHONPATH": str(process.ROOT)},
            on_line=self._lines.put,
            stdin=True,
        )

    def ready(self, timeout_s: float = 600) -> float:
        """Wait until it has loaded what it needs; the seconds that took. Raises as `ask` does."""
        return float(self._answer(timeout_s)["ready"])

    def ask(self, question: Any, timeout_s: float = 600) -> Any:
        """
        Raises:
            UserError: the process has ended, or says nothing.
        """
        stdin = self.child.process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
        except OSError:
            pass  # it has ended: said below, with its own words
        return self._answer(timeout_s)

    def _answer(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                return json.loads(self._lines.get(timeout=1))
            except queue.Empty:
                if self.child.process.poll() is not None:
                    raise UserError(f"{self.name} cannot run: {self.child.wait(1).reason()}") from None
        raise UserError(f"{self.name} gave no answer in {timeout_s:g} s; give it less to do")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stop()

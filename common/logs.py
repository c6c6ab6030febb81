"""Logging that knows its rank, metrics as JSON lines, and a progress line that stays silent in a pipe."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO


def env_rank() -> int:
    """This process's global rank as its launcher set it (torchrun, then srun), 0 under plain python."""
    for name in ("RANK", "SLURM_PROCID"):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0


class _Structured(logging.LoggerAdapter[logging.Logger]):
    """Keyword arguments become `key=value` behind the message: log.info("saved", step=20)."""

    def process(self, msg: str, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        passed = {k: kwargs.pop(k) for k in ("exc_info", "stack_info", "stacklevel", "extra") if k in kwargs}
        fields = " ".join(f"{key}={_format(value)}" for key, value in kwargs.items())
        return (f"{msg}  {fields}" if fields else msg), passed


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def get_logger(name: str = "book") -> _Structured:
    return _Structured(logging.getLogger(name))


def setup(*, all_ranks: bool = False, level: int = logging.INFO) -> None:
    """Log to stderr: rank 0 alone from INFO up, the other ranks too with `all_ranks`; warnings come from every rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank{env_rank()} %(levelname).1s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("book")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level if all_ranks or env_rank() == 0 else max(level, logging.WARNING))


class Metrics:
    """Append-only JSON lines, one object a call, flushed at once: a kill loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():  # what a kill left of a last line would spoil the next one
            written = path.read_bytes()
            os.truncate(path, written.rfind(b"\n") + 1)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, **values: object) -> None:
        self._file.write(json.dumps(finite(values), default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All complete lines; a last line cut short by a kill is left out."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


class Progress:
    """One line that is rewritten in place on a terminal (stderr), at most ten times a second; nothing in a pipe."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label = total, label
        self._last = 0.0
        self._shown = sys.stderr.isatty() and env_rank() == 0

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if not self._shown or (now - self._last < 0.1 and done < self.total):
            return
        self._last = now
        filled = 24 * done // max(self.total, 1)
        bar = "█" * filled + "·" * (24 - filled)
        print(f"\r\x1b[2K{self.label} {bar} {done}/{self.total} {note}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._shown:
            print(file=sys.stderr)

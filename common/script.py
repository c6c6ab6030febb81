"""What every exercise script shares: flags, run folder, RESULT line, one-line errors, seeding, atomic writes."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import functools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from common import logs

Result = dict[str, Any]
T = TypeVar("T")
leave_at_once = False  # set by dist.session, for _exit
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "deepspeed", "megatron-core", "ray")


class UserError(Exception):
    """A mistake of the user's, worded as `what; what to do`. `run` prints it as one line and exits with 2."""


class CheckFailed(Exception):
    """What a script checks does not hold. Its RESULT is printed all the same; one line and exit code 1."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts have; `doc` is the script's docstring, shown by --help."""
    made = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    shared = made.add_argument_group("shared by all scripts")
    shared.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    shared.add_argument("--seed", type=at_least(0), default=0)
    shared.add_argument(
        "--run-dir", type=Path, help="where result.json and plots go (default: runs/CHAPTER/SCRIPT/TIME)"
    )
    shared.add_argument("--all-ranks", action="store_true", help="log from every rank, not only from rank 0")
    return made


def at_least(minimum: int) -> Callable[[str], int]:
    """argparse type: an integer not below `minimum`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return convert


def positive(text: str) -> float:
    """argparse type: a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def comma_list(convert: Callable[[str], T]) -> Callable[[str], list[T]]:
    """argparse type: one or more values of another type, comma separated."""
    return lambda text: [convert(part.strip()) for part in text.split(",")]


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when complete: write beside, fsync, rename, fsync the folder."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Run:
    """The folder of one run: env.json at the start, metrics and plots during it, result.json at the end.

    Only rank 0 writes there. What the other ranks know must be gathered to it first.
    """

    current: Run | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics: logs.Metrics | None = None
        if logs.env_rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(folder / "env.json") as file:
                    json.dump(environment(), file, indent=2)
            except OSError as error:
                raise UserError(f"cannot write to {folder} ({error.strerror}); pass another --run-dir") from None
        Run.current = self

    def path(self, name: str) -> Path:
        return self.folder / name

    def log(self, **values: object) -> None:
        """Append one line to metrics.jsonl (rank 0 only)."""
        if logs.env_rank() == 0:
            self._metrics = self._metrics or logs.Metrics(self.folder / "metrics.jsonl")
            self._metrics.write(**values)

    def finish(self, result: Result) -> None:
        with atomic_write(self.folder / "result.json") as file:
            json.dump(result, file, indent=2)


def start(file: str, args: argparse.Namespace) -> Run:
    """Set up logging and open the run folder of the script `file` (its __file__)."""
    logs.setup(all_ranks=args.all_ranks)
    script = Path(file).resolve()
    root = Path(__file__).resolve().parents[1]
    root = root if script.is_relative_to(root) else script.parents[1]
    folder = args.run_dir or root / "runs" / script.relative_to(root).with_suffix("") / _timestamp()
    return Run(folder)


def _timestamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"


def environment() -> Result:
    """Versions, hardware, commit and command: what someone needs to repeat the run."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.executable).name, *sys.argv],
        "python": platform.python_version(),
        "versions": versions,
        "hardware": hardware(),
        "commit": _commit(),
        "launch": {k: os.environ[k] for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID") if k in os.environ},
    }


def hardware() -> Result:
    """CPU model, usable cores, memory and GPUs of this machine."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": usable_cores(), "memory_gib": round(memory, 1), "gpus": gpu_names()}


@functools.cache
def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, asked of nvidia-smi: no torch and no CUDA context."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    names = [line.strip() for line in listed.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([v for v in visible.split(",") if v.strip() not in ("", "-1")])]


def usable_cores() -> int:
    """Cores that this process may run on (affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and every GPU)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _rounded(value: Any) -> Any:
    """Floats to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")
    )


def run(main: Callable[[], Result]) -> NoReturn:
    """Run a script's main: RESULT as the last line of stdout, or one line on stderr and exit code 2 for a UserError.

    A CheckFailed has both, and exit code 1.
    """
    try:
        _report(main())
    except CheckFailed as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        _report(error.result)
        _exit(1)
    except UserError as error:
        _exit_with_line(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _exit_with_line(f"the disk is full ({error.filename or 'while writing'}); make room, or write elsewhere")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        what = str(error).strip().splitlines()[0] if str(error) else "a Python allocation failed"
        what = re.sub(r"^\[enforce fail at \S+\] .*?(?=\w+Allocator)", "", what)  # where in torch's own source
        _exit_with_line(f"out of memory ({what}); take a smaller --preset, --batch-size or --seq-len")
    _exit(0)


def _exit(code: int) -> NoReturn:
    """Leave; once a process group was open, without Python's own shutdown.

    A gloo thread that drops its last tensors only then aborts the process (pytorch issue 190489), whose work is done.
    """
    if not leave_at_once or sys.flags.interactive:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(result: Result) -> None:
    result = logs.finite(_rounded(result))
    if logs.env_rank() == 0:
        if Run.current is not None:
            Run.current.finish(result)
        _print_line("RESULT " + json.dumps(result), sys.stdout)


def _exit_with_line(message: str) -> NoReturn:
    several = "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
    where = f" [rank {logs.env_rank()}]" if several else ""
    _print_line(f"error{where}: " + " ".join(message.split()), sys.stderr)
    _exit(2)


def _print_line(line: str, file: IO[str]) -> None:
    """In one write: unbuffered, print makes two, and another rank on the same pipe can come in between."""
    print(line + "\n", end="", file=file, flush=True)

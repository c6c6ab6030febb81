"""A function on several ranks of this machine: N processes over gloo or NCCL, under one hard time limit.

    ranks = run_ranks(step_on_each_rank, 2, "tied")      # a function of a module; its value comes back pickled
    print(values(ranks))

The processes are forked from a server that has imported torch once: a rank starts in milliseconds instead of three
seconds. A rank that is not done at the limit is killed, and reported as timed out; it also ends when the process ends
that called run_ranks, in whatever way. (For scripts there is torchrun.)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from common.script import UserError

forkserver = multiprocessing.get_context("forkserver")
_preloaded = ["common.dist", "torch._dynamo"]
forkserver.set_forkserver_preload(_preloaded)
CONSEQUENCE = re.compile("left with an error|lost another rank")  # not the cause
LAUNCHER_PREFIXES = ("SLURM_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Rank:
    """How one rank ended. returncode is negative for a signal; value is what the function returned, else None."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool
    value: Any = None


def free_port() -> int:
    """A TCP port that nothing listens on now, and that the kernel gives to nobody who asks it for any port.

    Of those (32768 and up on Linux) another process could get this very one before the caller listens on it.

    Raises:
        UserError: a hundred of them are taken.
    """
    for port in random.SystemRandom().sample(range(20000, 29000), 100):  # ranks have seeded `random` alike
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("100 TCP ports between 20000 and 29000 are taken; look who listens there (ss -tlnp)")


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """torchrun's variables for a rank on one node."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def environments(
    world_size: int, ranks: Iterable[int] | None, env: Callable[[int], Mapping[str, str]] | Mapping[str, str] | None
) -> list[dict[str, str]]:
    """The whole environment of each process in `ranks`; `env` adds to it, for all or by position."""
    port = free_port()
    base = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    extra = env if callable(env) else lambda _: env or {}
    return [
        base | rank_environment(rank, world_size, port) | dict(extra(position))
        for position, rank in enumerate(range(world_size) if ranks is None else ranks)
    ]


def run_ranks(
    function: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    ranks: Iterable[int] | None = None,
    env: Callable[[int], Mapping[str, str]] | Mapping[str, str] | None = None,
    timeout_s: float = 60,
) -> list[Rank]:
    """Call `function(*args)` in one process a rank.

    Args:
        function: of a module's top level; it finds its rank as a script does, with dist.session.
        ranks: those to start, in the order of the answer; some may be missing or double. Default: all.
        env: further variables, for all or by position in `ranks`.
        timeout_s: after it every process that still lives is killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folders, workers = [], []
        started = time.monotonic()
        try:
            for position, variables in enumerate(environments(world_size, ranks, env)):
                folder = Path(name) / str(position)
                folder.mkdir()
                worker = forkserver.Process(target=_call, args=(folder, variables, function, args))
                worker.start()
                folders.append(folder)
                workers.append(worker)
            waiting: dict[Any, int] = {worker.sentinel: position for position, worker in enumerate(workers)}
            seconds = [timeout_s] * len(workers)
            while waiting and (left := started + timeout_s - time.monotonic()) > 0:
                for sentinel in wait(list(waiting), left):
                    seconds[waiting.pop(sentinel)] = time.monotonic() - started
        finally:  # those that are not done, at the limit or when we are interrupted
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
            for worker in workers:
                worker.join(10)
        answers = []
        for position, (folder, worker) in enumerate(zip(folders, workers, strict=True)):
            value = folder / "value"
            answers.append(
                Rank(
                    returncode=worker.exitcode if worker.exitcode is not None else -9,
                    stdout=(folder / "stdout").read_text(errors="replace") if (folder / "stdout").exists() else "",
                    stderr=(folder / "stderr").read_text(errors="replace") if (folder / "stderr").exists() else "",
                    seconds=seconds[position],
                    timed_out=position in waiting.values(),
                    value=pickle.loads(value.read_bytes()) if value.exists() else None,
                )
            )
        return answers


def preload(*modules: str) -> None:
    """Let the server import these too, once for all ranks. It starts with the first rank; after that it is too late."""
    _preloaded.extend(modules)
    forkserver.set_forkserver_preload(_preloaded)


def end_with_parent() -> None:
    """In a process of the forkserver: end when the one ends that asked for it, be it by SIGKILL.

    The forkserver, which is the parent in the system's eyes, would live on. It waits for a pipe that only the asker
    holds open.
    """
    asker = multiprocessing.parent_process()
    assert asker

    def wait_for_end() -> None:
        asker.join()
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _call(folder: Path, variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    end_with_parent()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(variables)
    if "torch" in sys.modules:  # imported before the variable was there
        sys.modules["torch"].set_num_threads(int(variables["OMP_NUM_THREADS"]))
    value = pickle.dumps(function(*args))
    (folder / "value.partial").write_bytes(value)
    (folder / "value.partial").rename(folder / "value")


def values(ranks: Sequence[Rank]) -> list[Any]:
    """What the ranks returned.

    Raises:
        UserError: one of them raised it; it is raised again here.
        RuntimeError: one of them did not end well; the message holds its stderr.
    """
    said = [
        line for rank in ranks for line in re.findall(r"^common\.script\.UserError: (.*)", rank.stderr, re.MULTILINE)
    ]
    if causes := [line for line in said if not CONSEQUENCE.search(line)]:
        raise UserError(causes[0])
    for number, rank in enumerate(ranks):
        if rank.timed_out:
            raise RuntimeError(f"rank {number} was stopped after {rank.seconds:.0f} s\n{rank.stderr[-4000:]}")
        if rank.returncode and not CONSEQUENCE.search(rank.stderr[-1000:]):
            raise RuntimeError(f"rank {number} ended with {rank.returncode}\n{rank.stderr[-4000:]}")
    if said:
        raise UserError(said[0])
    return [rank.value for rank in ranks]

"""Several ranks in a test: a script under plain python or torchrun. (A function: common.ranks, also found here.)

ranks = run_script(path, 2, ["--steps", "3"])        # plain python with torchrun's variables, no agent
ranks = fork_script(path, 2, ["--steps", "3"])       # the same, without three seconds of imports a rank
done = torchrun(path, 2, ["--steps", "3"])           # torchrun itself
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from common import process
from common.ranks import (
    Rank,
    environments,
    forkserver,
    free_port,
    preload,
    rank_environment,
    run_ranks,
    values,
)

__all__ = [
    "Rank", "fork_script", "forkserver", "free_port", "rank_environment", "run_ranks", "run_script", "torchrun",
    "values",
]  # fmt: skip

preload(
    "ch04_fsdp.train_fsdp",  # with what it takes from the chapters before
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
    "datasets",
    "pytest",  # a rank imports the test's module
    "hypothesis",
)


def run_script(
    script: Path | str,
    world_size: int = 2,
    args: Sequence[str] = (),
    *,
    ranks: Iterable[int] | None = None,
    env: Callable[[int], Mapping[str, str]] | Mapping[str, str] | None = None,
    timeout_s: float = 60,
) -> list[Rank]:
    """Start a script once a rank with plain python, without an agent that would stop the others when one fails."""
    started = time.monotonic()
    children: list[process.Child] = []
    try:
        for variables in environments(world_size, ranks, env):
            child = process.Child([sys.executable, str(script), *args], env=variables)
            children.append(child)
        done = [child.wait(max(0.1, started + timeout_s - time.monotonic())) for child in children]
    finally:
        for child in children:
            child.__exit__()
    return [Rank(d.returncode, d.stdout, d.stderr, d.seconds, d.timed_out, d.result) for d in done]


def _main(script: str, argv: Sequence[str]) -> None:
    os.chdir(process.ROOT)
    sys.argv = [script, *argv]
    runpy.run_path(str(process.ROOT / script), run_name="__main__")


def fork_script(
    script: Path | str, world_size: int = 2, args: Sequence[str | Path] = (), *, timeout_s: float = 60
) -> list[Rank]:
    """As run_script, by processes that are forked from the warmed-up server."""
    ended = run_ranks(_main, world_size, str(script), [str(arg) for arg in args], timeout_s=timeout_s)
    done = [process.Finished([], r.returncode, r.stdout, r.stderr, r.seconds, r.timed_out) for r in ended]
    return [Rank(d.returncode, d.stdout, d.stderr, d.seconds, d.timed_out, d.result) for d in done]


def torchrun(
    script: Path | str,
    world_size: int = 2,
    args: Sequence[str] = (),
    *,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float = 90,
) -> process.Finished:
    """Start a script with torchrun --standalone."""
    command = ["torchrun", "--standalone", f"--nproc-per-node={world_size}", *flags, str(script), *args]
    return process.run(command, timeout_s=timeout_s, env=env)

"""Run a script as a process of its own without paying for `import torch` each time: forked from a warmed-up server.

The child is a real process with its own stdout, stderr and exit code, and may be killed by SIGKILL like any other.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver as fork_server
from multiprocessing import resource_tracker
from pathlib import Path

from common.process import ROOT, Finished
from common.ranks import end_with_parent
from tests.spawn import forkserver


def _child(
    script: str, argv: list[str], env: Mapping[str, str], out: str, err: str, before: Callable[[], None] | None
) -> None:
    end_with_parent()
    # Ranks that the script starts come from the same server. Python's documentation says so of a child, but its
    # ensure_running would start another server here, which imports torch again: four seconds.
    fork_server._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[attr-defined, method-assign]
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    os.chdir(ROOT)
    os.environ.update(env)
    sys.argv = [script, *argv]
    try:
        if before:
            before()
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def run_script(
    script: str,
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120,
    before: Callable[[], None] | None = None,
) -> Finished:
    """Run `script` with `argv`. `before` is called in the child first: a picklable function that breaks something."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = f"{folder}/out", f"{folder}/err"
        arguments = (script, [str(a) for a in argv], {"OMP_NUM_THREADS": "1", **(env or {})}, out, err, before)
        process = forkserver.Process(target=_child, args=arguments)
        process.start()
        process.join(timeout_s)
        timed_out = process.is_alive()
        if timed_out:
            process.kill()
            process.join()
        texts = [Path(p).read_text(errors="replace") if Path(p).exists() else "" for p in (out, err)]
    assert process.exitcode is not None
    return Finished([script, *map(str, argv)], process.exitcode, texts[0], texts[1], 0.0, timed_out)

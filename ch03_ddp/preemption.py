"""Leave in good order when asked to: whichever rank gets the signal, all save and stop after the same step."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

import torch

from common.dist import Context
from common.logs import get_logger
from common.script import UserError

log = get_logger()


def parse_signal(text: str) -> signal.Signals:
    """argparse type: TERM, SIGUSR1, ..."""
    try:
        return signal.Signals["SIG" + text.strip().upper().removeprefix("SIG")]
    except KeyError:
        raise UserError(f"there is no signal {text!r}; take TERM, USR1 or others of `kill -l`") from None


class Preemption:
    """Ask at the beginning of a step whether anybody was told to stop; by its end all have the same answer.

    The message is one number over gloo, also beside NCCL, and travels while the step computes.
    """

    def __init__(self, signals: Sequence[signal.Signals], ctx: Context) -> None:
        self.ctx, self.caught = ctx, False
        self.watched = bool(signals)
        for number in signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.caught = True

    def ask(self) -> None:
        if self.watched:
            self._anybody = torch.tensor([int(self.caught)])
            self._handle = torch.distributed.all_reduce(self._anybody, torch.distributed.ReduceOp.MAX, async_op=True)

    def answer(self) -> bool:
        """Whether to save and leave now."""
        if not self.watched:
            return False
        self._handle.wait()
        return bool(self._anybody)


def requeue() -> bool:
    """Ask Slurm to start this job again, from a job that saved. Whether it was asked and will.

    Only a job that still counts as running: one that somebody cancels gets the same SIGTERM, and would come back.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or not shutil.which("scontrol"):
        return False
    state = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=60)
    if state.stdout.strip() != "RUNNING":
        log.info(f"job {job} is being cancelled, or requeued by Slurm itself", state=state.stdout.strip())
        return False
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if done.returncode:
        log.warning(f"Slurm did not requeue job {job} ({done.stderr.strip()}); start it again by hand")
    return done.returncode == 0

"""Leave in good order when asked to: whichever rank gets the signal, all save and stop after the same step."""

from __future__ import annotations

import os
import re
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
        self.ctx, self.caught = ctx, 0  # the signal's number
        self.watched = bool(signals)
        for number in signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.caught = number

    def ask(self) -> None:
        if self.watched:
            self._anybody = torch.tensor([self.caught])
            self._handle = torch.distributed.all_reduce(self._anybody, torch.distributed.ReduceOp.MAX, async_op=True)

    def answer(self) -> signal.Signals | None:
        """The signal on which to save and leave now, the same on all ranks; None to go on."""
        if not self.watched:
            return None
        self._handle.wait()
        return signal.Signals(int(self._anybody)) if self._anybody else None


def requeue(caught: signal.Signals) -> bool:
    """Ask Slurm to start this job again, now that it has saved. Whether it did.

    A preempted job that leaves by itself within its GraceTime counts as completed: it must ask. SIGTERM without
    preemption needs no asking (scancel means it, torchrun sends it when a node joins), and a job that does not count as
    running any more is cancelled, or on its way back already.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or not shutil.which("scontrol"):
        return False
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=60).stdout
    preempted = re.search(r"PreemptTime=\d", shown)
    if "JobState=RUNNING" not in shown or (caught == signal.SIGTERM and not preempted):
        return False
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if done.returncode:
        log.warning(f"Slurm did not requeue job {job} ({done.stderr.strip()}); start it again by hand")
    return done.returncode == 0

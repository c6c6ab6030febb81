"""Checkpoints of a DDP job: every rank's random state, written aside while training goes on, the newest whole one used.

Chapter 1's checkpoint.py writes and verifies one; here is what a job of several ranks adds.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ch01_intro import checkpoint
from common.logs import get_logger
from common.script import UserError, atomic_write

log = get_logger()


class Keeper:
    """Saves to `folder`: the newest `keep` and the one of the lowest validation loss stay."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, keep: int, in_background: bool) -> None:
        self.folder, self.settings, self.keep, self.in_background = folder, settings, keep, in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def best_before(self, step: int) -> tuple[str, float]:
        """Name and validation loss of the best checkpoint so far. One that a resume has gone back behind is none."""
        try:
            told = json.loads((self.folder / "best.json").read_text())
            if told["name"] < f"step-{step:08d}":
                return told["name"], told["val_loss"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return "", math.inf

    def save(self, step: int, state: dict[str, Any], val_loss: float | None = None) -> None:
        """Write a checkpoint; in the background, training goes on as soon as the state is copied to CPU memory."""
        self.wait()
        if not self.in_background:
            self._write(step, state, val_loss)
            return
        copied = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
        self._thread = threading.Thread(target=self._try, args=(step, copied, val_loss))
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way is on the disk.

        Raises:
            what went wrong in it: a full disk is not found out at the end of the job.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try(self, *saved: Any) -> None:
        try:
            self._write(*saved)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, state: dict[str, Any], val_loss: float | None) -> None:
        name, lowest = self.best_before(step)
        better = val_loss is not None and val_loss < lowest
        path = checkpoint.save(
            self.folder, step, state, self.settings, keep=self.keep + better, spare=name
        )  # the old best stays until the new one is known as such
        if better:
            with atomic_write(self.folder / "best.json") as file:
                json.dump({"name": path.name, "val_loss": val_loss}, file)
            checkpoint.prune(path, keep=self.keep, spare=path.name)


def newest_whole(folder: Path, settings: dict[str, Any]) -> tuple[Path, int, dict[str, Any]] | None:
    """Path, step and state of the newest checkpoint that is what was saved; None where there is none at all.

    Raises:
        UserError: there are checkpoints and all are corrupt, or the newest was made with other settings.
    """
    found = checkpoint.every(folder)
    for path in reversed(found):
        try:
            return path, *checkpoint.load(path, settings)
        except checkpoint.Corrupt as error:
            log.warning(f"{error}".split(";")[0] + "; trying the one before it")
    if found:
        raise UserError(f"all {len(found)} checkpoints in {folder} are corrupt; remove them to start anew")
    return None

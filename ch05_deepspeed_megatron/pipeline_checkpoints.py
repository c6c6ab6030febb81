"""Checkpoints of a pipeline: DeepSpeed's own files, in a folder that appears only when complete and is verified.

DeepSpeed writes a file a layer (weights), a file a stage (the engine's counters, and the optimizer's state without
ZeRO) and with ZeRO 1 or bf16 a file a rank (its part of the state). Weights could be read by other stages; the
optimizer's state could not, so a run goes on with the stages that it had.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp import checkpoints
from common.script import UserError


class Keeper(checkpoints.Keeper):
    """Saves to `folder`: the newest `keep` and the one of the lowest validation loss stay. All collectives."""

    def save(self, step: int, engine: Any, position: int, val_loss: float | None = None) -> None:  # type: ignore[override]
        """
        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        partial = self._begin(step)
        with self._full_disk_named():
            torch.save(training.random_state(), partial / f"rng-{self.ctx.rank}.pt")
            if self.ctx.is_main:
                engine.module.config.save_pretrained(partial)
            engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
        self.ctx.barrier("checkpoint written")  # before the files are shared out, to be hashed
        self._write(step, partial, position, None, val_loss)

    def _own_files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.is_file())[self.ctx.rank :: self.ctx.world_size]

    def check(self, path: Path) -> dict[str, Any]:
        """What the checkpoint says of itself; before anything is built.

        Raises:
            UserError: it is missing, corrupt, or of another run.
        """
        meta = self.verified(path)
        if not list(path.glob("layer_*-model_states.pt")):
            raise UserError(f"{path} was not made by the pipeline's script; resume it with the one that made it")
        return meta

    def load(self, path: Path, meta: dict[str, Any], engine: Any) -> tuple[int, int]:  # type: ignore[override]
        """Fill the stage, the optimizer and this rank's random numbers. Returns the step, and the data's position."""
        with torch.no_grad():  # it broadcasts the tied weights themselves
            engine.load_checkpoint(str(path.parent), tag=path.name)
        return self.resumed(path, meta)

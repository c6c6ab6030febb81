"""Checkpoints of a pipeline: DeepSpeed's own files, in a folder that appears only when complete and is verified.

DeepSpeed writes a file a layer (weights), a file a stage (the engine's counters, and the optimizer's state without
ZeRO) and with ZeRO 1 or bf16 a file a rank (its part of the state). Weights could be read by other stages; the
optimizer's state could not, so a run goes on with the stages that it had.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ch05_deepspeed_megatron import checkpoints
from common.script import UserError


class Keeper(checkpoints.Keeper):
    """Saves to `folder`: the newest `keep` and the one of the lowest validation loss stay. All collectives."""

    def _save_engine(self, engine: Any, partial: Path) -> None:
        engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
        self.ctx.barrier("checkpoint written")  # before the files are shared out, to be hashed

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

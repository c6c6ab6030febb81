"""Checkpoints of a DeepSpeed engine that appear only when whole, are verified by hash, and say what made them.

DeepSpeed writes into the folder that it is given, file by file, and then a file `latest`: a kill between the two leaves
a folder that looks like a checkpoint. Here it writes into a hidden folder, which gets its name when all of it is on the
disk, as in chapter 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp import checkpoints as sharded
from ch05_deepspeed_megatron import engine as engines
from common.script import UserError

TAG = "engine"  # the folder inside a checkpoint that DeepSpeed writes


class Keeper(sharded.Keeper):
    """Saves to `folder`: the newest `keep` and the one of the lowest validation loss stay."""

    def save(self, step: int, engine: Any, position: int, val_loss: float | None = None) -> None:  # type: ignore[override]
        """A collective.

        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        partial = self._begin(step)
        with self._full_disk_named():
            torch.save(training.random_state(), partial / f"rng-{self.ctx.rank}.pt")
            if self.ctx.is_main:
                engine.module.config.save_pretrained(partial)
            engine.save_checkpoint(str(partial), tag=TAG)
        self._write(step, partial, position, None, val_loss)

    def _own_files(self, folder: Path) -> list[Path]:
        rank = self.ctx.rank
        mine = [folder / f"rng-{rank}.pt", *(folder / TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_*")]
        if self.ctx.is_main:
            whole = [path for path in (folder / TAG).iterdir() if "zero_pp_rank_" not in path.name]
            mine += [folder / "config.json", folder / "latest", *whole]
        return mine

    def load(self, path: Path, engine: Any) -> tuple[int, int]:  # type: ignore[override]
        """Fill the engine and this rank's random numbers. Returns the step, and the data's position.

        Raises:
            UserError: it is missing, corrupt, of another run, stage or number of ranks.
        """
        meta = self.verified(path)
        if not (path / TAG).is_dir():
            raise UserError(f"{path} was not made by this script; resume it with the one that made it")
        if meta["ranks"] != self.ctx.world_size:
            raise UserError(
                f"{path} was saved by {meta['ranks']} ranks, these are {self.ctx.world_size}; take as many, or make it "
                "universal first"
            )
        engine.load_checkpoint(str(path), tag=TAG)
        if engines.stage_of(engine.config) == 3:
            engine.optimizer.empty_partition_cache()
        return self.resumed(path, meta)

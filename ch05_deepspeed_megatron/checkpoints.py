"""Checkpoints of a DeepSpeed engine that appear only when whole, are verified by hash, and say what made them.

DeepSpeed writes into the folder that it is given, file by file, and then a file `latest`: a kill between the two leaves
a folder that looks like a checkpoint. Here it writes into a hidden folder, which gets its name when all of it is on the
disk, as in chapter 4.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp import checkpoints as sharded
from ch05_deepspeed_megatron import engine as engines
from ch05_deepspeed_megatron import universal_format, zero_files
from common.logs import get_logger
from common.script import UserError

log = get_logger()
TAG = "engine"  # the folder inside a checkpoint that DeepSpeed writes


@torch.no_grad()
def load_beside_the_disk(engine: Any, folder: Path, rank: int) -> None:
    """Of an optimizer on NVMe DeepSpeed 0.19.8 copies the swap files back, and reads the weights in them alone. Moments
    would start anew, and so would what it saves beside: the count of steps, the loss scale, and all that is too small
    for a file, as norms are."""
    zero, file = engine.optimizer, next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    saved = torch.load(file, map_location="cpu", weights_only=False)["optimizer_state_dict"]  # classes of its own
    zero.checkpoint_event_prologue()  # norms are cut up, and in the end gathered anew
    zero.loss_scaler, zero.dynamic_loss_scale = saved["loss_scaler"], saved["dynamic_loss_scale"]
    for number, weights in enumerate(saved["fp32_flat_groups"]):
        own = zero.fp32_partitioned_groups_flat[number]
        state = zero.optimizer.state[own] = dict(saved["optimizer_state_dict"]["state"][number])
        if zero._swappable_optimizer_subgroup(number):  # the next step reads moments from files that it knows of
            size = int(zero.fp16_partitioned_groups_flat_numel[number])
            state |= {name: weights.new_empty(size) for name in state if name != "step"}
            zero.optimizer_swapper._get_param_swap_info(own).release_memory()
        if weights.numel():
            own.copy_(weights)
            zero._reassign_or_swap_out_partitioned_parameters(number)
    zero.checkpoint_event_epilogue()


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
            self._save_engine(engine, partial)
        self._write(step, partial, position, None, val_loss)

    def _save_engine(self, engine: Any, partial: Path) -> None:
        engine.save_checkpoint(str(partial), tag=TAG)

    def _own_files(self, folder: Path) -> list[Path]:
        """Those that this rank has written: rank 0 also what belongs to none of them."""
        rank = self.ctx.rank
        mine = [folder / f"rng-{rank}.pt", *(folder / TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_*")]
        swapped = folder / TAG / universal_format.OFFLOADED
        mine += [path for path in (swapped / f"rank{rank:02d}").rglob("*") if path.is_file()]
        if self.ctx.is_main:
            whole = [path for path in (folder / TAG).glob("*.pt") if "zero_pp_rank_" not in path.name]
            mine += [folder / "config.json", folder / "latest", *whole]
        return mine

    def load(self, path: Path, engine: Any) -> tuple[int, int]:  # type: ignore[override]
        """Fill the engine and this rank's random numbers. Returns the step, and the data's position.

        A checkpoint of other ranks or another ZeRO stage is made universal first, in a folder that goes again.

        Raises:
            UserError: it is missing, corrupt, of another run, or cannot be read by these ranks.
        """
        meta = self.verified(path)
        if not (path / TAG).is_dir():
            raise UserError(f"{path} was not made by this script; resume it with the one that made it")
        stage = engines.stage_of(engine.config)
        was = zero_files.stage_of(path / TAG)
        as_it_is = was == (2 if stage == 1 else stage) and meta["ranks"] == self.ctx.world_size
        if as_it_is or was == stage == 0:
            engine.load_checkpoint(str(path), tag=TAG)
            if engine.zero_nvme_offload_optimizer():
                load_beside_the_disk(engine, path / TAG, self.ctx.rank)
        else:
            self._load_universal(path, engine, stage)
        if stage == 3:
            engine.optimizer.empty_partition_cache()
        return self.resumed(path, meta)

    def _load_universal(self, path: Path, engine: Any, stage: int) -> None:
        scratch = path.with_name(f".{path.name}.universal")  # what a kill leaves of it, the next save removes
        self._on_main(lambda: self._make_universal(path, scratch, stage))
        told = universal_format.hyperparameters(engine)
        # "checkpoint": {"load_universal": true}: how many ranks there were is not for a config file to say.
        engine._config.load_universal_checkpoint = True
        try:
            engine.load_checkpoint(str(scratch), tag=TAG)
        finally:
            engine._config.load_universal_checkpoint = False
        universal_format.load_frozen(engine, path / TAG)
        universal_format.mend(engine, told)
        self.ctx.barrier("universal checkpoint loaded")
        if self.ctx.is_main:
            shutil.rmtree(scratch, ignore_errors=True)

    def _make_universal(self, path: Path, scratch: Path, stage: int) -> None:
        log.info("making it universal", checkpoint=path, in_folder=scratch, stage=stage)
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            universal_format.convert(path / TAG, scratch / TAG, stage)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise UserError(
                f"cannot write {scratch} ({error.strerror}); it takes twice the checkpoint's size: make room, or take "
                "as many ranks and the stage that saved it"
            ) from None

    def _on_main(self, work: Callable[[], None]) -> None:
        """Rank 0 works and all wait, however long it takes: a barrier would give up after the session's timeout.

        Raises:
            whatever the work raises, on rank 0; on the others a UserError that says so.
        """
        working = ThreadPoolExecutor(1).submit(work) if self.ctx.is_main else None
        while True:
            if working:
                wait([working], timeout=5)
            if self.ctx.exchange("rank 0 works", str(working and working.done()))[0] == "True":
                break
        if working:
            working.result()
        self.ctx.barrier("rank 0 has worked")

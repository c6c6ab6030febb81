"""Megatron-Core's distributed checkpoints: each rank writes its shards, any layout reads them.

    keeper = Keeper(out / "checkpoints", settings, ctx, keep=2)
    keeper.save(step, ddp, optimizer, position)       # a collective, as everything here
    step, position = keeper.load(keeper.find(args), ddp, optimizer)

megatron.core.dist_checkpointing describes each tensor by where it lies in the whole model, merged matrices by their
parts, so that a load takes what its layout needs. The optimizer's state is saved as "fully_reshardable": by parameter,
put together from the data-parallel ranks, which may be others in number at the next start. What chapter 4's keeper adds
is the same as there: complete or not there at all, verified by hash, pruned when old.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ch01_intro import training
from ch04_fsdp import checkpoints as fsdp_checkpoints
from ch05_deepspeed_megatron.megatron_model import inner
from common.dist import Context
from common.logs import get_logger
from common.script import UserError

log = get_logger()


def sharded_state(model: nn.Module, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """What to save, or the places to load into. A collective."""
    from megatron.core import parallel_state

    how = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {"model": inner(model).sharded_state_dict(metadata=how)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=how)
    return state


def begin(optimizer: Any) -> None:
    """Give AdamW the state that it would make in its first step: a load fills what is there, and Megatron-Core asserts
    that torch's optimizer has a step, which its own of Transformer Engine counts elsewhere."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
                    part.optimizer.state[parameter] = {"step": torch.zeros(())} | moments


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """optimizer.load_state_dict, with the step that torch's AdamW counts; Megatron-Core 0.16.1 is made for another one.

    Its distributed optimizer looks for a step among the tensors of each parameter, where it saved none: a KeyError. And
    it gives all parameters one and the same counter, which AdamW then raises once a parameter: moments corrected for
    the wrong step, and nobody is told.
    """
    for part in optimizer.chained_optimizers:
        if put := getattr(part, "_set_main_param_and_optimizer_states", None):
            held = part._get_main_param_and_optimizer_states
            part._set_main_param_and_optimizer_states = lambda parameter, tensors, put=put, held=held: put(
                parameter, {"step": held(parameter)["step"]} | tensors
            )
    optimizer.load_state_dict(state)
    for part in optimizer.chained_optimizers:
        vars(part).pop("_set_main_param_and_optimizer_states", None)
        for own in part.optimizer.state.values():
            own["step"] = own["step"].clone()


def random_state() -> dict[str, Any]:
    """Chapter 1's, and Megatron's own streams for dropout on a GPU."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return training.random_state() | {"tracker": get_cuda_rng_tracker().get_states()}


def restore_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    get_cuda_rng_tracker().set_states(state.pop("tracker"))
    training.restore_random_state(state)


class Keeper(fsdp_checkpoints.Keeper):
    """Saves to `folder`: the newest `keep` and the one of the lowest validation loss stay."""

    def __init__(self, folder: Path, settings: dict[str, Any], ctx: Context, *, keep: int) -> None:
        super().__init__(folder, settings, ctx, keep=keep)

    def save(  # type: ignore[override]
        self, step: int, model: nn.Module, optimizer: Any, position: int, val_loss: float | None = None
    ) -> None:
        """
        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        from megatron.core import dist_checkpointing

        partial = self._begin(step)
        with self._full_disk_named():
            dist_checkpointing.save(sharded_state(model, optimizer, is_loading=False), str(partial))
            torch.save(random_state(), partial / f"rng-{self.ctx.rank}.pt")
            if self.ctx.is_main:
                inner(model).hf_config.save_pretrained(partial)
        self._write(step, partial, position, None, val_loss)

    def _own_files(self, folder: Path) -> list[Path]:
        also = [folder / name for name in ("common.pt", "metadata.json")] if self.ctx.is_main else []
        return [path for path in [*super()._own_files(folder), *also] if path.exists()]

    def load(self, path: Path, model: nn.Module, optimizer: Any) -> tuple[int, int]:
        """Fill the model, the optimizer and this rank's random numbers. Returns the step, and the data's position.

        Raises:
            UserError: it is missing, corrupt, of another run or of another script.
        """
        meta = self.verified(path)
        if not (path / "metadata.json").exists():
            raise UserError(f"{path} was not saved by Megatron-Core; resume it with the script that made it")
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException

        begin(optimizer)
        try:
            state = dist_checkpointing.load(sharded_state(model, optimizer, is_loading=True), str(path))
        except (CheckpointingException, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path} does not fit this model ({reason}); it is of another one") from None
        inner(model).load_state_dict(state["model"])
        load_optimizer(optimizer, state["optimizer"])
        same = meta["ranks"] == self.ctx.world_size  # else each keeps the stream that it was seeded with
        return self.resumed(path, meta, restore_random_state if same else lambda _: None)

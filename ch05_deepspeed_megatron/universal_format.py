"""A DeepSpeed checkpoint for other ranks or another ZeRO stage: its universal format, and what that leaves to us.

    convert(checkpoint / "engine", scratch / "engine", stage=3)
    ...engine.load_checkpoint(scratch, tag="engine")     # with "checkpoint": {"load_universal": true}
    load_frozen(engine, checkpoint / "engine")
    mend(engine, hyperparameters)

ds_to_universal cuts what the ranks have saved into one folder a parameter with its whole float32 weight and moments
("Universal Checkpointing", arXiv:2406.18820). Each stage writes another dialect, which only its own loader reads:
`convert` translates, so that any of stages 1, 2 and 3 goes on from any other.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import torch

from ch05_deepspeed_megatron import zero_files
from common.script import UserError

STATES = ("fp32", "exp_avg", "exp_avg_sq")  # ds_to_universal knows Adam's
OFFLOADED = "offloaded_tensors"  # the folder of an optimizer on NVMe, a copy of its swap files


def convert(folder: Path, universal: Path, stage: int) -> None:
    """Write a universal checkpoint of `folder` for an engine of `stage`. One process, no GPU; reads a rank at a time.

    It takes 12 bytes a parameter on the disk, and in passing twice as much.

    Raises:
        UserError: the optimizer's state is not in the checkpoint, or one of the two stages is 0.
    """
    from deepspeed.checkpoint import ds_to_universal

    was = zero_files.stage_of(folder)
    if 0 in (was, stage):
        raise UserError(f"{folder.parent} is of ZeRO stage {was}, this engine of {stage}; take the stage that saved it")
    if (folder / OFFLOADED).exists():
        raise UserError(
            f"{folder.parent} has its optimizer as files of NVMe offload, which only as many ranks can read; take as "
            "many, or train from the model that consolidate.py makes"
        )
    words = argparse.Namespace(
        input_folder=str(folder), output_folder=str(universal), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(words)
    if was == 3 and stage < 3:
        _from_3_to_2(universal)
    elif was < 3 and stage == 3:
        _from_2_to_3(universal)


def _from_3_to_2(universal: Path) -> None:
    """Stage 3 has flat tensors, and one optimizer for all; 1 and 2 want shapes, and the step beside each tensor."""
    source = next(universal.glob("zero_pp_rank_0_*_model_states.pt"))
    model = _read(source)
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    state = _read(universal / "zero/optimizer_state.pt")
    optimizer = state.pop("optimizer_state_dict")
    for name, shape in shapes.items():
        for key in STATES:
            path = universal / "zero" / name / f"{key}.pt"
            torch.save({"param": _read(path).view(shape), "cat_dim": 0}, path)
        torch.save(optimizer["state"][0]["step"], universal / "zero" / name / "step.pt")
    torch.save(state | {"ds_version": model["ds_version"]}, universal / "zero/optimizer_state.pt")
    shutil.copyfile(source, universal / "mp_rank_00_model_states.pt")


def _from_2_to_3(universal: Path) -> None:
    state = _read(universal / "zero/optimizer_state.pt")
    step = _read(next(universal.glob("zero/*/step.pt")))
    state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    torch.save(state, universal / "zero/optimizer_state.pt")
    shutil.copyfile(universal / "mp_rank_00_model_states.pt", universal / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # DeepSpeed pickles its own classes


@torch.no_grad()
def load_frozen(engine: Any, folder: Path) -> None:
    """Fill the weights that no optimizer trains, which DeepSpeed's universal format has not. A collective."""
    from deepspeed import zero

    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    if not frozen:
        return
    for name, whole in zero_files.parameters(folder, "frozen"):
        if name in frozen:  # the others are buffers
            with zero.GatheredParameters([frozen[name]], modifier_rank=0):
                frozen[name].copy_(whole)


def hyperparameters(engine: Any) -> list[dict[str, Any]]:
    """What each group of the optimizer is told: to be taken before a load, and given to `mend` after it."""
    return [{key: value for key, value in g.items() if key != "params"} for g in engine.optimizer.param_groups]


def mend(engine: Any, groups: list[dict[str, Any]]) -> None:
    """Undo two things that DeepSpeed's loader of stage 3 does (0.19.8): it gives all groups the weight decay of the
    first, and one tensor that counts their steps, which each of them then counts on."""
    for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(own)
    for parameter, state in engine.optimizer.optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            on_device = groups[0].get("fused") or groups[0].get("capturable")
            state["step"] = state["step"].to(parameter.device if on_device else "cpu", copy=True)

"""What DeepSpeed's ranks have saved, file by file: where the pieces of each parameter lie in each ZeRO stage.

    for name, whole in parameters(checkpoint / "engine"): ...               # float32, one at a time, no ranks needed
    for name, moment in parameters(checkpoint / "engine", "exp_avg"): ...

Stages 1 and 2 have one file of the model as it computes, stage 3 one a rank; what the optimizer trains lies cut up in a
file a rank: the weights in float32, and their moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Keys = tuple[Any, ...]
Groups = list[dict[str, torch.Size]]  # name and shape of each parameter, by group of the optimizer


@dataclass(frozen=True)
class Piece:
    """Elements of a parameter in a file: of the flat tensor at these keys, or all of it where `numel` is None."""

    file: Path
    keys: Keys
    start: int = 0
    numel: int | None = None


def parameters(folder: Path, state: str = "fp32", keep_open_bytes: int = 2**26) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole float32 value of each parameter that DeepSpeed has saved to `folder`, a tied one once.

    Args:
        state: fp32; frozen: the same of those that no optimizer trains; or what it holds of the others: exp_avg,
            exp_avg_sq.
        keep_open_bytes: files are mapped, not read; after so many bytes they are mapped anew, so that the pages go.
    """
    opened: dict[Path, Any] = {}
    taken = 0
    for name, shape, pieces in _plan(folder, state):
        parts = []
        for piece in pieces:
            if piece.file not in opened:
                opened[piece.file] = _open(piece.file)
            found = opened[piece.file]
            for key in piece.keys:
                found = found[key]
            flat = found.detach().reshape(-1)
            parts.append(flat if piece.numel is None else flat.narrow(0, piece.start, piece.numel))
        whole = torch.cat(parts).float()[: math.prod(shape)].view(tuple(shape))
        taken += whole.numel() * whole.element_size()
        if taken > keep_open_bytes:
            opened, taken = {}, 0
        yield name, whole


Planned = tuple[str, torch.Size, list[Piece]]


def _open(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def stage_of(folder: Path) -> int:
    """What the files of a checkpoint say: 3, 2 (also for 1: the same files), or 0: nothing is cut, all read all."""
    if not any(folder.glob("*zero_pp_rank_*_optim_states.pt")):
        return 0
    return 2 if (folder / "mp_rank_00_model_states.pt").exists() else 3


def _plan(folder: Path, state: str) -> Iterator[Planned]:
    """Name, shape and pieces of each parameter, in the order in which they lie in the files."""
    stage = stage_of(folder)
    models = sorted(
        folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_*"), key=_rank
    )
    shards = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
    groups: Groups = _open(models[0])["param_shapes"] or []  # none in stage 0
    if state in ("fp32", "frozen"):
        trained = {name for shapes in groups for name in shapes}
        yield from _untrained_of_stage_3(models) if stage == 3 else _untrained(models[0], trained)
    if state != "frozen":
        flat = [_keys(stage, state, number) for number in range(len(groups))]
        yield from (_of_stage_3 if stage == 3 else _of_stage_2)(groups, flat, shards)


def _untrained(file: Path, trained: set[str]) -> Iterator[Planned]:
    """What is in the model's file alone: frozen weights, buffers, in stage 0 all; a tied weight once."""
    seen: set[int] = set()
    for name, tensor in _open(file)["module"].items():
        if name not in trained and tensor.data_ptr() not in seen:
            yield name, tensor.shape, [Piece(file, ("module", name))]
        seen.add(tensor.data_ptr())


def _untrained_of_stage_3(files: list[Path]) -> Iterator[Planned]:
    """Of a frozen weight each rank has a part, of a buffer all of it."""
    model = _open(files[0])
    for name, shape in (model["frozen_param_shapes"] or {}).items():
        yield name, shape, [Piece(file, ("frozen_param_fragments", name)) for file in files]
    for name in model["buffer_names"]:
        yield name, model["module"][name].shape, [Piece(files[0], ("module", name))]


def _rank(path: Path) -> int:
    return int(path.name.partition("pp_rank_")[2].partition("_")[0] or 0)


def _keys(stage: int, state: str, group: int) -> Keys:
    """Where in a shard's file the flat tensor of a group lies."""
    if state == "fp32":
        return "optimizer_state_dict", "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups", group
    within = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    return "optimizer_state_dict", within, "state", group, state


def _of_stage_3(groups: Groups, flat: list[Keys], shards: list[Path]) -> Iterator[Planned]:
    """Each rank has a part of every parameter, the last ones padded; the parts lie one behind the other."""
    for shapes, keys in zip(groups, flat, strict=True):
        start = 0
        for name, shape in shapes.items():
            part = math.ceil(math.prod(shape) / len(shards))
            yield name, shape, [Piece(file, keys, start, part) for file in shards]
            start += part


def _of_stage_2(groups: Groups, flat: list[Keys], shards: list[Path]) -> Iterator[Planned]:
    """All parameters one behind the other, cut into as many parts as ranks: a rank says what it has of which."""
    mappings = [_open(file)["optimizer_state_dict"]["param_slice_mappings"] for file in shards]
    for number, (shapes, keys) in enumerate(zip(groups, flat, strict=True)):
        for name, shape in shapes.items():
            found = zip(shards, (mapping[number].get(name) for mapping in mappings), strict=True)
            yield name, shape, [Piece(file, keys, at.start, at.numel) for file, at in found if at]

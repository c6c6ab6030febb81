"""A DeepSpeed config file: read, its "auto" filled in, and checked (ds_check.py) before a model is built.

settings = prepare(Path("ch05_deepspeed_megatron/configs/zero3.json"), known_by(ranks=2, ...), ranks=2)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ch05_deepspeed_megatron import ds_check
from common.script import UserError

AUTO = "auto"
LEAST_ON_DISK = 2**18  # float32 elements: of 1 MiB, below which DeepSpeed leaves a sub-group in memory


def read(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: the file is missing, no JSON, or has a key twice: of two values JSON readers keep the last.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, _ in pairs:
            if [name for name, _ in pairs].count(key) > 1:
                raise UserError(f"{path} has {key!r} twice; keep one of them")
        return dict(pairs)

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise UserError(f"cannot read the DeepSpeed config {path} ({error.strerror}); check the path") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); mend it there") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; a DeepSpeed config is one JSON object")
    return found


def fill(settings: Mapping[str, Any], known: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A copy in which "auto" is what the script knows under the key's dotted name, as in optimizer.params.lr.

    Transformers' Trainer reads "auto" in the same way, so that these files serve it too.

    Raises:
        UserError: the script does not know it.
    """
    filled = {}
    for key, value in settings.items():
        name = f"{where}{key}"
        if isinstance(value, dict):
            filled[key] = fill(value, known, f"{name}.")
        elif value != AUTO:
            filled[key] = value
        elif name in known:
            filled[key] = known[name]
        elif key == "nvme_path":
            raise UserError(f'{name} is "auto", and no disk is named; pass --nvme-dir FOLDER')
        else:
            raise UserError(f'{name} cannot be "auto"; only {", ".join(sorted(known))} can')
    return filled


def known_by(
    *,
    ranks: int,
    global_batch: int,
    micro_batch: int,
    clip: float,
    lr: float,
    hidden: int,
    dtype: torch.dtype,
    largest: int = 0,
    layers: int = 0,
    nvme: Path | None = None,
) -> dict[str, Any]:
    """What "auto" stands for.

    Args:
        global_batch: sequences a step over all ranks. micro_batch: sequences a rank and pass.
        hidden: the model's width: message sizes follow from it, as in transformers' Trainer.
        largest: elements of the largest parameter (default: 4 x hidden^2, an MLP's), for what is offloaded to a disk.
        layers: of the model, each of which is one checkpoint of activations.
        nvme: a folder on the disk to offload to.

    Raises:
        UserError: the ranks would make unequal numbers of passes.
    """
    if global_batch % (ranks * micro_batch):
        raise UserError(
            f"--global-batch {global_batch} is no multiple of {ranks} ranks x --batch-size {micro_batch}; DeepSpeed "
            "counts whole micro-batches: take a multiple"
        )
    layer = 12 * hidden * hidden  # elements, about, of one of Llama's
    known: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": global_batch // (ranks * micro_batch),
        "gradient_clipping": clip,
        "optimizer.params.lr": lr,
        "optimizer.params.fused": True,
        "bf16.enabled": dtype == torch.bfloat16,
        "fp16.enabled": dtype == torch.float16,
        "zero_optimization.reduce_bucket_size": layer,
        "zero_optimization.stage3_prefetch_bucket_size": layer,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden,  # the norms' weights stay whole
        "zero_optimization.sub_group_size": max(layer // ranks, LEAST_ON_DISK),
        "zero_optimization.offload_param.buffer_size": -(-(largest or 4 * hidden * hidden) // ranks),
        "activation_checkpointing.number_checkpoints": layers,
    }
    if nvme:
        known |= {f"zero_optimization.offload_{what}.nvme_path": str(nvme) for what in ("optimizer", "param")}
    return known


def prepare(path: Path, known: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The settings to initialize an engine with: read, filled and checked.

    Raises:
        UserError: something in the file is wrong; the line names the key.
    """
    settings = fill(read(path), known)
    try:
        ds_check.check(settings, ranks)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return settings

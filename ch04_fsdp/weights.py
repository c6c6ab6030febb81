"""Weights for a model that no rank could hold: built without memory, sharded, and only then filled, row by row.

model = shard(plan(config), sharding, mesh)        # shapes alone: on the meta device
allocate(model, ctx.device)                        # memory for this rank's rows
initialize(model, seed)  or  load(model, folder)   # random ones, or this rank's rows of a Hugging Face checkpoint
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ch04_fsdp import disk
from common import lm
from common.script import UserError


def plan(config: Any) -> nn.Module:
    """The model on the meta device: shapes and no memory, in float32, whatever type a checkpoint is in."""
    config.dtype = torch.float32  # else transformers takes what the checkpoint's config says
    return lm.build(config, "meta")


def allocate(model: nn.Module, device: torch.device, compute: torch.device | None = None) -> None:
    """Memory on `device` for what this rank holds. Buffers (the rotary angles) are computed, as no checkpoint holds
    them, and live where the model computes."""
    if disk.of(model) is None:
        model.to_empty(device=device)
    else:  # its parameters have their place in a file
        allocate_buffers(model, device)
    if not isinstance(model, FSDPModule):  # each place of a tied parameter got memory of its own
        model.tie_weights()  # type: ignore[operator]
    initialize_buffers(model, compute or device)


def allocate_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))


@torch.no_grad()
def initialize_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            vars(module).pop("_is_hf_initialized", None)  # else it is taken for loaded
            model._init_weights(module)  # type: ignore[operator]
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Random weights that depend on the seed and a parameter's name alone: the same model on any number of ranks.

    Each rank draws the whole of one parameter at a time and keeps its rows. Norms are 1 and biases 0, as in Llama.
    """
    reshard(model)
    for name, parameter in disk.visited(model, changed=True):
        # Where the ranks compute, also if shards are offloaded: a GPU draws other numbers than a CPU.
        device = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        draw(whole, name, seed, model.config.initializer_range)
        parameter.copy_(_shard_like(whole, parameter))


def draw(whole: torch.Tensor, name: str, seed: int, std: float) -> None:
    """The initial value of one whole parameter, in place."""
    if whole.dim() < 2:
        whole.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    whole.normal_(0.0, std, generator=torch.Generator(whole.device).manual_seed(number))


def _shard_like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that every rank has, without a message."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def checkpoint_files(name: str) -> Path:
    """The folder of a local Hugging Face checkpoint, or of one that is fetched from the hub.

    Raises:
        UserError: it cannot be found or fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"cannot fetch {name!r} from the hub ({reason}); give a local folder") from None


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """In which safetensors file each tensor lies.

    Raises:
        UserError: there is none, the index names one that is missing, or one is corrupt.
    """
    try:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = json.loads(index.read_text())["weight_map"]
            found = {name: folder / file for name, file in names.items()}
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                found = dict.fromkeys(file.keys(), folder / "model.safetensors")
        if missing := next((path for path in found.values() if not path.exists()), None):
            raise UserError(f"{missing} is missing, though the index names it; copy the whole checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"no safetensors checkpoint in {folder} ({error}); it needs model.safetensors") from None
    return found


class Stored:
    """The tensors of a Hugging Face folder, read part by part; one file is open at a time, and closed for the next.

    Raises:
        UserError: the folder has no checkpoint, or a tensor that is not among the known, where these are given.
    """

    def __init__(self, folder: Path, known: Collection[str] | None = None) -> None:
        self.folder, self.files, self.bytes_read = folder, files_of_tensors(folder), 0
        if known is not None:
            self.refuse_all_but(known)
        self._opened: dict[Path, Any] = {}

    def refuse_all_but(self, known: Collection[str]) -> None:
        """
        Raises:
            UserError: there is a tensor that is not among the known.
        """
        if surplus := [name for name in self.files if name not in known and not name.endswith("inv_freq")]:
            raise UserError(
                f"{self.folder} has {surplus[0]}, which the model has not; it is a checkpoint of another model"
            )

    def check(self, name: str, shape: Sequence[int]) -> Any:
        """The tensor, of which nothing has been read yet.

        Raises:
            UserError: it is missing, of another shape, or its file is unreadable.
        """
        if name not in self.files:
            raise UserError(f"{self.folder} has no tensor {name}; it is a checkpoint of another model")
        with self._readable():
            if self.files[name] not in self._opened:
                self._opened = {
                    self.files[name]: safe_open(self.files[name], framework="pt")
                }  # the one before is closed
            found = self._opened[self.files[name]].get_slice(name)
            has = list(found.get_shape())
        if has != list(shape):
            raise UserError(
                f"{name} in {self.folder} is {has}, the model's {list(shape)}; it is a checkpoint of another model"
            )
        return found

    def read(self, name: str, shape: Sequence[int], part: slice | tuple[slice, ...] = slice(None)) -> torch.Tensor:
        """
        Args:
            shape: of the whole tensor.

        Raises:
            UserError: as check says.
        """
        found = self.check(name, shape)
        with self._readable():
            piece: torch.Tensor = found[part]
        self.bytes_read += piece.numel() * piece.element_size()
        return piece

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the checkpoint in {self.folder} ({error}); copy it again") from None


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> int:
    """Fill a sharded model from safetensors. Each rank reads its own rows from the disk; none holds a whole model.

    Returns:
        The bytes that this rank has read.

    Raises:
        UserError: a tensor is missing, too many, of another shape or unreadable: the checkpoint is of another model.
    """
    reshard(model)
    stored = Stored(folder, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    for name, parameter in disk.visited(model, changed=True):  # a tied one once
        own, rows = _own(parameter)
        if own.numel():
            own.copy_(stored.read(name, parameter.shape, rows))
        else:
            stored.check(name, parameter.shape)
    return stored.bytes_read


def _own(parameter: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """What this rank holds of a parameter, and which rows of the whole that is."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, parameter.shape[0])
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), slice(offset[0], offset[0] + shape[0])


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward has left gathered, as it does where weights wait for backward.

    Until then named_parameters() shows the gathered weights, which under mixed precision have 16 bits.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole value of one parameter after another, sorted by name. A collective: all ranks must go through."""
    reshard(model)
    for name, parameter in disk.visited(model, changed=False):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield name, whole.detach()


def sha256(model: nn.Module) -> str:
    """common.lm.weights_sha256 of the whole model, however it is sharded."""
    return sha256_of(whole_parameters(model))


def sha256_of(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """common.lm.weights_sha256 of parameters that come one after another, by name in sorted order."""
    digest = hashlib.sha256()
    for name, whole in named:
        digest.update(name.encode())
        digest.update(whole.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

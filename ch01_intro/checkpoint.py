"""Checkpoints that a kill cannot spoil: written beside, fsynced, renamed, and verified by hash before they are used."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import IO, Any

import torch

from common.script import UserError, sync

KEEP = 2  # the newest, and one before it should a disk spoil the newest


class _Hashing(io.RawIOBase):
    """Passes bytes on to a file and hashes them on the way, so that a large state is read and held only once."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


class Corrupt(UserError):
    """A checkpoint is not what was saved."""


def save(
    folder: Path, step: int, state: dict[str, Any], settings: dict[str, Any], *, keep: int = KEEP, spare: str = ""
) -> Path:
    """Write folder/step-00000020/{state.pt, meta.json}. The rename is the moment from which the checkpoint exists.

    Then the others go, as `prune` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    for left in folder.glob(".step-*"):  # by a run that was killed in here
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    with (partial / "state.pt").open("wb") as file:
        hashing = _Hashing(file)
        torch.save(state, hashing)
        _sync(file)
    hashing.digest.update(_described(step, settings))
    with (partial / "meta.json").open("w") as file:
        json.dump({"step": step, "sha256": hashing.digest.hexdigest(), "settings": settings}, file)
        _sync(file)
    sync(partial)
    if final.exists():
        remove(final)
    os.rename(partial, final)
    sync(folder)
    prune(final, keep=keep, spare=spare)
    return final


def prune(newest: Path, *, keep: int, spare: str = "") -> None:
    """Remove all but `newest`, which was just saved, the `keep` - 1 before it, and the one named `spare`.

    A run saves in order, so that a higher number is of a course that was left, by a resume from an older checkpoint. It
    goes too, lest the next resume, from the highest number, be on that course again.
    """
    found = every(newest.parent)
    course = [path for path in found if path.name <= newest.name]
    kept = {path.name for path in course[-keep:]} | {spare}
    for path in found:
        if path.name not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Out of sight first: a kill in the middle must not leave half a checkpoint that looks like a whole one."""
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone)


def _described(step: int, settings: dict[str, Any]) -> bytes:
    return json.dumps([step, settings], sort_keys=True).encode()


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def every(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load(path: Path, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The step and the state of one checkpoint, on the CPU.

    Raises:
        Corrupt: it is incomplete, or not what was saved.
        UserError: it is missing, or was made with other settings.
    """
    try:
        meta = json.loads((path / "meta.json").read_text())
        digest = hashlib.sha256()
        with (path / "state.pt").open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        digest.update(_described(meta["step"], meta["settings"]))
        if digest.hexdigest() != meta["sha256"]:
            raise ValueError("its hash differs from the one it was saved with")
        for name, wanted in settings.items():
            if meta["settings"].get(name) != wanted:
                had = meta["settings"].get(name)
                raise UserError(
                    f"{path} was made with {name} {had}, this run has {wanted}; use the same or a new --out"
                )
        return int(meta["step"]), torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        kind = Corrupt if path.is_dir() else UserError
        raise kind(f"no checkpoint at {path} ({Path(error.filename).name} is missing); check --resume") from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
    ) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise Corrupt(f"{path} is corrupt ({reason}); remove it to resume from the checkpoint before it") from None

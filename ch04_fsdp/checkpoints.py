"""Sharded checkpoints: each rank writes its part, any number of ranks reads it, and no rank ever holds the whole.

    keeper = Keeper(out / "checkpoints", settings, ctx, keep=2, in_background=True)
    keeper.save(step, model, optimizer, position)     # a collective, as everything here
    step, position = keeper.load(keeper.find(args), model, optimizer)

torch.distributed.checkpoint (DCP) does the work: it writes a file a rank and an index that says where each piece of
each tensor lies, so that a load reads what it needs, however the tensor is cut now. What it leaves to us: a checkpoint
that appears only when all of it is on the disk, is verified by hash before it is used, and is pruned when it is old.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ch01_intro import checkpoint, training
from ch03_ddp import checkpoints as ddp_checkpoints
from common.dist import Context
from common.logs import get_logger
from common.script import UserError, atomic_write, sync

log = get_logger()


class Keeper(ddp_checkpoints.Keeper):
    """Saves to `folder`: the newest `keep` and the one of the lowest validation loss stay."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], ctx: Context, *, keep: int, in_background: bool = False
    ) -> None:
        super().__init__(folder, settings, keep=keep, in_background=in_background)
        self.ctx = ctx
        # Of its own: a save in the background must not mix its messages with those of training.
        self.group = dist.new_group(backend="gloo") if ctx.world_size > 1 else None

    def save(  # type: ignore[override]
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: int,
        val_loss: float | None = None,
    ) -> None:
        """Write a checkpoint; in the background, training goes on as soon as this rank's part is copied.

        Raises:
            UserError: the folder cannot be written to, or the disk is full; also on account of the save before it.
        """
        self.wait()
        partial = self._begin(step)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        write = dcp.async_save if self.in_background else dcp.save
        with self._full_disk_named():
            torch.save(training.random_state(), partial / f"rng-{self.ctx.rank}.pt")
            if self.ctx.is_main:
                model.config.save_pretrained(partial)  # type: ignore[union-attr]
            pending = write(state, storage_writer=dcp.FileSystemWriter(partial), process_group=self.group)
        saved = (step, partial, position, pending, val_loss)
        if self.in_background:
            self._thread = Thread(target=self._try, args=saved)
            self._thread.start()
        else:
            self._write(*saved)

    def _begin(self, step: int) -> Path:
        """An empty folder, in which all ranks may write."""
        partial = self.folder / f".step-{step:08d}.partial"
        if self.ctx.is_main:
            self._make(partial)
        self.ctx.barrier("checkpoint folder")
        return partial

    def _make(self, partial: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step-*"):  # by a run that was killed in here
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}); pass another --out") from None

    @contextlib.contextmanager
    def _full_disk_named(self) -> Iterator[None]:
        """torch's words for it are many, as "unexpected pos 704 vs 598"."""
        try:
            yield
        except (CheckpointException, OSError, RuntimeError) as error:
            if type(error) is RuntimeError and not re.search("inline_container|Parent directory", str(error)):
                raise
            free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
            raise UserError(
                f"cannot save to {self.folder} on rank {self.ctx.rank}, with {free / 2**30:.2f} GiB free "
                f"({_reason(error)}); make room, or pass another --out, which all ranks see"
            ) from None

    def _write(self, step: int, partial: Path, position: int, pending: Any, val_loss: float | None) -> None:  # type: ignore[override]
        """When all ranks have written: note what each file must be, and give the folder its name."""
        if isinstance(pending, Future):
            with self._full_disk_named():
                pending.result()
        hashes: list[dict[str, str]] = [{} for _ in range(self.ctx.world_size)]
        own = {str(path.relative_to(partial)): _sha256(path) for path in self._own_files(partial)}
        dist.all_gather_object(hashes, own, self.group)
        if self.ctx.is_main:
            meta = {
                "step": step, "position": position, "settings": self.settings, "ranks": self.ctx.world_size,
                "torch": torch.__version__,
                "files": {name: digest for part in hashes for name, digest in part.items()},
            }  # fmt: skip
            with (partial / "meta.json").open("w") as file:
                json.dump(meta | {"sha256": _described(meta)}, file)
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            final = self.folder / f"step-{step:08d}"
            if final.exists():
                checkpoint.remove(final)
            os.rename(partial, final)
            sync(self.folder)
            self._prune(step, final, val_loss)
        dist.barrier(self.group)

    def _own_files(self, folder: Path) -> list[Path]:
        """Those that this rank has written. Rank 0 also has the index and the model's config."""
        mine = [*folder.glob(f"__{self.ctx.rank}_*.distcp"), folder / f"rng-{self.ctx.rank}.pt"]
        return [*mine, folder / ".metadata", folder / "config.json"] if self.ctx.is_main else mine

    def _prune(self, step: int, newest: Path, val_loss: float | None) -> None:
        best, lowest = self.best_before(step)
        if val_loss is not None and val_loss < lowest:
            best = newest.name
            with atomic_write(self.folder / "best.json") as file:
                json.dump({"name": best, "val_loss": val_loss}, file)
        checkpoint.prune(newest, keep=self.keep, spare=best)

    def find(self, args: argparse.Namespace) -> Path | None:
        """The checkpoint that --resume means; None to begin anew. A corrupt newest one is passed over, saying so.

        Raises:
            UserError: --out holds checkpoints and --resume was not given, or all are corrupt.
        """
        if args.resume != "auto" or not args.out:
            return training.find_checkpoint(args)
        found = checkpoint.every(self.folder)
        said = set(self.ctx.exchange("checkpoints", ", ".join(path.name for path in found) or "none"))
        if len(said) > 1:  # each would verify another one, and wait for the others
            raise UserError(
                f"the ranks see different checkpoints in {self.folder}: {' and '.join(sorted(said))}; give all nodes "
                "the same --out, a shared folder"
            )
        for path in reversed(found):
            if not (reason := self.fault(path)):
                return path
            log.warning(f"{path} is corrupt ({reason}); trying the one before it")
        if found:
            raise UserError(f"all {len(found)} checkpoints in {self.folder} are corrupt; remove them to start anew")
        return None

    def fault(self, path: Path) -> str:
        """What is wrong with a checkpoint, "" if nothing is: the ranks share out its files, and all know the answer."""
        own = fault(path, self.ctx.rank, self.ctx.world_size)
        return next(filter(None, self.ctx.exchange("checkpoint verified", own)), "")

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Fill the model, the optimizer and this rank's random numbers. Returns the step, and the data's position.

        Raises:
            UserError: it is missing, corrupt, or of another run.
        """
        meta = self.verified(path)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        try:
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), process_group=self.group)
        except (CheckpointException, ValueError, RuntimeError) as error:
            raise UserError(f"{path} does not fit this model ({_reason(error)}); it is of another one") from None
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return self.resumed(path, meta)

    def verified(self, path: Path) -> dict[str, Any]:
        """What a checkpoint says of itself, after all ranks have looked at its files.

        Raises:
            UserError: it is missing, corrupt, or of another run.
        """
        if (path / "state.pt").exists():
            raise UserError(f"{path} is not sharded: it was made by chapter 1's or 3's script; resume it there")
        if not (path / "meta.json").exists():
            raise UserError(f"no checkpoint at {path} (meta.json is missing); check --resume")
        if reason := self.fault(path):
            raise UserError(f"{path} is corrupt ({reason}); remove it to resume from the one before it")
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
        for name, wanted in self.settings.items():
            if (had := meta["settings"].get(name)) != wanted:
                raise UserError(
                    f"{path} was made with {name} {had}, this run has {wanted}; use the same or a new --out"
                )
        if meta["torch"] != torch.__version__:
            log.warning(f"{path} was saved by torch {meta['torch']}, this is {torch.__version__}")
        return meta

    def resumed(
        self,
        path: Path,
        meta: dict[str, Any],
        restore: Callable[[dict[str, Any]], None] = training.restore_random_state,
    ) -> tuple[int, int]:
        """This rank's random numbers go on too. Returns the step, and the data's position."""
        own = path / f"rng-{self.ctx.rank}.pt"
        if own.exists():  # a rank that was not there keeps the stream it was seeded with
            restore(torch.load(own, weights_only=True))
        log.info("resumed", checkpoint=path, step=meta["step"], saved_by_ranks=meta["ranks"])
        return meta["step"], meta["position"]


def fault(path: Path, rank: int = 0, world_size: int = 1) -> str:
    """What is wrong with this rank's share of a checkpoint's files; "" if nothing is."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta.pop("sha256") != _described(meta):
            return "meta.json is not what was saved"
        for name in sorted(meta["files"])[rank::world_size]:
            if _sha256(path / name) != meta["files"][name]:
                return f"{name} is not what was saved"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"[:120]
    return ""


def _reason(error: BaseException) -> str:
    """In a few words. DCP wraps what went wrong on each rank in one exception, tracebacks and all."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:160]


def _described(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

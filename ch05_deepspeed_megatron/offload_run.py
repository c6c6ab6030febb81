"""A few training steps by one config file, on ranks of their own and under a memory cap if wanted: losses and bytes.

done = short_run.run(Job(Sharding(), settings="zero3_nvme", folder=disk, layers=6, hidden=512), train=train)
done.result["held_bytes"], done.result["disk_bytes"]; or done.error
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp import memory_cap, resident, short_run, weights, zero_peers
from ch05_deepspeed_megatron import ds_config, engine, infinity, options
from common import data, dist, profiling

WARM_UP = 2  # steps that are not timed: stage 3 learns the order of the layers in the first


@dataclass(frozen=True)
class Job(short_run.Job):
    """As chapter 4's; folder is the disk to offload to."""

    settings: str = "zero3"  # a file of configs/
    sub_group_size: int | None = None  # in place of the file's

    def filled(self) -> dict[str, Any]:
        config = self.config()
        known = ds_config.known_by(
            ranks=self.ranks, global_batch=self.global_batch, micro_batch=self.global_batch // self.ranks, clip=1.0,
            lr=self.lr, hidden=config.hidden_size, layers=config.num_hidden_layers, dtype=torch.float32,
            largest=max(shape.numel() for shape in infinity.shapes_of(config)), nvme=self.folder,
        )  # fmt: skip
        found = ds_config.prepare(options.CONFIGS / f"{self.settings}.json", known, self.ranks)
        if self.sub_group_size:
            found["zero_optimization"]["sub_group_size"] = self.sub_group_size
        return found

    def place(self) -> infinity.Place:
        """What one rank holds, by the formula."""
        return infinity.place(
            infinity.shapes_of(self.config()), self.filled(), ranks=self.ranks, dtype=torch.float32
        )  # fmt: skip


def train(job: Job) -> dict[str, Any]:
    """On each rank; on rank 0 the answer. Bytes are of the rank that has most; held: between backward and the step.

    What the libraries take for themselves (code, threads, buffers) is there before the cap is.
    """
    with dist.session(job.device, timeout_s=90) as ctx:
        blocks = data.Blocks(
            training.load_corpus(Namespace(preset=job.preset, data="stdlib", seq_len=job.seq_len)).train, job.seq_len
        )
        _steps(replace(job, layers=1, hidden=64, steps=1, global_batch=ctx.world_size), blocks, ctx)
        resident.return_at_once()
        before, peak = held(ctx.device), memory_cap.Peak(ctx.device)
        with memory_cap.limited(job.cap_bytes, ctx.device):
            found = _steps(job, blocks, ctx)
        own = {kind: size - before[kind] for kind, size in found.pop("held").items()} | {"peak_bytes": peak.bytes()}
        every = ctx.gather(own)
        return found | {kind: max(rank[kind] for rank in every) for kind in own} if ctx.is_main else {}


def _steps(job: Job, blocks: data.Blocks, ctx: dist.Context) -> dict[str, Any]:
    settings = job.filled()
    model = engine.build(job.config(), settings, ctx, seq_len=job.seq_len, seed=job.seed)
    zero = engine.initialize(model, settings, ctx)
    feed = data.ShardedBatches(
        blocks, job.global_batch // ctx.world_size, rank=ctx.rank, world_size=ctx.world_size, seed=job.seed
    )
    losses, seconds, found = [], [], {}
    for number in range(1, job.steps + 1):
        begin = time.perf_counter()
        inputs, targets = (tensor.to(ctx.device) for tensor in next(feed))
        loss = zero_peers.backward(zero, [(inputs, targets)], job.global_batch * job.seq_len, ctx.world_size)
        if number == job.steps:  # by now all is there: states, and what stage 3 learns of the order of the layers
            gc.collect()
            found["held"] = held(ctx.device)
            ctx.barrier("weighed")
            found["disk_bytes"] = on_disk(job.folder)
        norm = zero_peers.update(zero)
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    last = statistics.median(seconds[WARM_UP:] or seconds)
    found |= {
        "losses": losses, "norm": float(norm), "step_s": last, "tokens_per_s": job.global_batch * job.seq_len / last,
        "weights_sha256": weights.sha256_of(engine.whole_weights(zero)),
    }  # fmt: skip
    zero.destroy()
    return found


def held(device: torch.device) -> dict[str, int]:
    """Bytes that a process holds now: of its device, and of the host. On a CPU they are the same: RssAnon of proc(5),
    which is memory that no file backs.
    """
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    host = int(found[1]) * 1024 if found else profiling.memory(torch.device("cpu")).current
    on_device = profiling.memory(device).current if device.type == "cuda" else host
    return {"held_bytes": on_device, "host_bytes": host}


def on_disk(folder: Path | None) -> int:
    """Of all ranks: what the files in the folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0

"""A few training steps under a memory cap, on ranks of their own: what the exercises about memory compare.

done = run(Job(Sharding("full", offload="disk"), ranks=1, cap_bytes=300 * 2**20))
done.result["losses"], or done.error: the one line that the ranks ended with
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from ch01_intro import training
from ch04_fsdp import disk, memory_cap, model, resident, step, weights
from ch04_fsdp.sharding import Sharding
from common import data, dist, lm, process, ranks, script

WARM_UP = 2  # steps that are not timed


@dataclass(frozen=True)
class Job:
    """What is trained, how, on how many ranks of this machine, and with how much memory for each."""

    sharding: Sharding
    ranks: int = 1
    preset: str = "nano"
    layers: int | None = None  # another depth and width than the preset's
    hidden: int | None = None
    steps: int = 6
    seq_len: int = 64
    global_batch: int = 4  # sequences a step, over all ranks
    lr: float = 1e-3
    seed: int = 0
    device: str = "auto"
    cap_bytes: int | None = None
    folder: Path | None = None  # for the disk tier
    cached: bool = True

    def config(self) -> Any:
        made = lm.config(self.preset, self.seq_len)
        if self.hidden:
            made.hidden_size, made.intermediate_size = self.hidden, 11 * self.hidden // 4
            made.num_attention_heads = made.num_key_value_heads = self.hidden // 64
            made.head_dim = 64
        made.num_hidden_layers = self.layers or made.num_hidden_layers
        return made

    @property
    def state_bytes(self) -> int:
        """float32 weights, gradients and Adam's two moments of the whole model."""
        return 16 * lm.parameter_count(self.config())


@dataclass(frozen=True)
class Done:
    """How a job ended: `result` of train(), or the error line of the rank that failed first. exit_codes by rank."""

    result: dict[str, Any] | None
    error: str
    exit_codes: list[int]
    seconds: float

    @property
    def out_of_memory(self) -> bool:
        return self.error.startswith("out of memory")


def run(job: Job, timeout_s: float = 120, train: Callable[[Any], dict[str, Any]] | None = None) -> Done:
    """Each rank ends as a script does, with its error line and exit code. One that hangs is killed at the limit.

    train: what a rank does, a function of a module (default: the one below).
    """
    ranks.preload("transformers.models.llama.modeling_llama")
    ended = ranks.run_ranks(_as_script, job.ranks, train or globals()["train"], job, timeout_s=timeout_s)
    lines = [line for rank in ended for line in re.findall(r"^error[^:]*: (.*)", rank.stderr, re.MULTILINE)]
    lines += [f"stopped after {timeout_s:g} s" for rank in ended if rank.timed_out]
    lines += [rank.stderr[-300:] for rank in ended if rank.returncode not in (0, 2)]
    causes = [line for line in lines if not ranks.CONSEQUENCE.search(line)] or lines
    first = ended[0]
    found = process.Finished((), first.returncode, first.stdout, first.stderr, first.seconds, first.timed_out).result
    codes = [rank.returncode for rank in ended]
    return Done(None if causes else found, causes[0] if causes else "", codes, max(rank.seconds for rank in ended))


def _as_script(train: Callable[[Any], dict[str, Any]], job: Job) -> None:
    script.run(partial(train, job))


def train(job: Job) -> dict[str, Any]:
    """On each rank; on rank 0 the answer: losses, rate, peaks of the rank that has most, all ranks' bytes of a step.

    What the libraries take for themselves (code, threads, buffers) is there before the cap is.
    """
    with dist.session(job.device, timeout_s=60) as ctx:
        blocks = data.Blocks(
            training.load_corpus(Namespace(preset=job.preset, data="stdlib", seq_len=job.seq_len)).train, job.seq_len
        )
        _steps(replace(job, layers=1, hidden=64, steps=1, global_batch=ctx.world_size), blocks, ctx)
        gc.collect()
        resident.return_at_once()
        peak, host_peak = memory_cap.Peak(ctx.device), memory_cap.Peak(torch.device("cpu"))
        with memory_cap.limited(job.cap_bytes, ctx.device):
            found = _steps(job, blocks, ctx)
        peaks = ctx.gather((peak.bytes(), host_peak.bytes()))
        moved = ctx.gather(found.pop("moved_bytes"))
        if not ctx.is_main:
            return {}
        peaks = {"peak_bytes": max(own for own, _ in peaks), "host_peak_bytes": max(own for _, own in peaks)}
        return found | peaks | {name: sum(own[name] for own in moved) for name in moved[0]}


def _steps(job: Job, blocks: data.Blocks, ctx: dist.Context) -> dict[str, Any]:
    wrapped = model.build(job.config(), job.sharding, ctx, seq_len=job.seq_len, seed=job.seed, offload_dir=job.folder)
    inner = model.inner(wrapped)
    optimizer = model.make_optimizer(inner, job.lr)
    tier = disk.of(inner)
    if tier:
        tier.cached = job.cached
    feed = data.ShardedBatches(
        blocks, job.global_batch // ctx.world_size, rank=ctx.rank, world_size=ctx.world_size, seed=job.seed
    )
    losses, seconds, before = [], [], Counter()
    for number in range(job.steps):
        if number == job.steps - 1:
            before = moved(tier)
        begin = time.perf_counter()
        inputs, targets = (tensor.to(ctx.device) for tensor in next(feed))
        loss = step.backward(wrapped, [(inputs, targets)], job.global_batch * job.seq_len, ctx.world_size, job.sharding)
        step.update(wrapped, optimizer, 1.0)
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    last = statistics.median(seconds[WARM_UP:] or seconds)
    result = {"losses": losses, "tokens_per_s": job.global_batch * job.seq_len / last, "step_s": last}
    last_step = moved(tier)
    last_step.subtract(before)
    result["moved_bytes"] = {**last_step, "file_bytes": tier.size if tier else 0}
    return result | {"weights_sha256": weights.sha256(inner)}


def moved(tier: disk.Tier | None) -> Counter[str]:
    """Bytes so far: what the tier counts, and what the kernel does (proc(5), io): read from the disk, or due to it."""
    kernel = psutil.Process().io_counters()
    return Counter(
        paged_in_bytes=tier.paged_in if tier else 0, paged_out_bytes=tier.paged_out if tier else 0,
        disk_read_bytes=kernel.read_bytes, disk_written_bytes=kernel.write_bytes,
    )  # fmt: skip

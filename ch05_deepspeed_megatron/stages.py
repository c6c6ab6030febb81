"""ZeRO's stages on one model, to be weighed, counted and timed: what compare_stages.py compares.

with dist.session(job.device) as ctx:
    stage = Stage("2", job, ctx)
    loss, norm = stage.train(batch)
    stage.held()                       # bytes by kind, between backward and the step
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ch02_hardware_parallelism.training import timed_ms
from ch04_fsdp import contestants, resident, zero_peers
from ch04_fsdp.budget import budget
from ch04_fsdp.compare_zero import narrowed
from ch04_fsdp.setting import Setting
from ch04_fsdp.traffic import Traffic
from ch04_fsdp.walk import PREFETCH_BUCKET, REDUCE_BUCKET
from ch05_deepspeed_megatron import ds_check, ds_config, engine, options
from common import dist, lm, profiling

NAMES = ("0", "1", "2", "3", "3, freed")
LIKE = {"0": "ddp", "1": "zero-1", "2": "zero-2", "3": "zero-3-keep", "3, freed": "zero-3"}  # contestants' formulas
PLANNED = {"0": "replicate", "1": "zero1", "2": "zero2", "3, freed": "zero3"}  # the planner's; it knows no "kept"
# Weights are to be gathered again in backward. Without the second key they are kept all the same, as long as the
# prefetcher finds them still there when it looks ahead to their use in backward.
FREED = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
WARM_UP = 3  # steps; stage 3 learns the order of the layers in the first


@dataclass(frozen=True)
class Job:
    config: Any  # of a transformers decoder
    ranks: int = 2
    micro_batch: int = 2
    accumulation: int = 1
    seq_len: int = 128
    dtype: torch.dtype = torch.float32
    lr: float = 1e-3
    seed: int = 0
    device: str = "auto"

    @property
    def tokens(self) -> int:
        return self.ranks * self.micro_batch * self.accumulation * self.seq_len

    def settings(self, name: str) -> dict[str, Any]:
        """Those of configs/zeroN.json; stage 0 is stage 1's file with another number, "freed" a key more."""
        stage = int(name[0])
        known = ds_config.known_by(
            ranks=self.ranks, global_batch=self.ranks * self.micro_batch * self.accumulation, clip=1.0, lr=self.lr,
            micro_batch=self.micro_batch, hidden=self.config.hidden_size, dtype=self.dtype,
        )  # fmt: skip
        settings = ds_config.fill(ds_config.read(options.CONFIGS / f"zero{max(stage, 1)}.json"), known)
        settings["zero_optimization"]["stage"] = stage
        if name == "3, freed":
            settings["zero_optimization"] |= FREED
        ds_check.check(settings, self.ranks)
        return settings

    def batches(self, ctx: dist.Context) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Random tokens, the same in each run: this rank's micro-batches of a step."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.ranks, self.accumulation, self.micro_batch, self.seq_len + 1)
        while True:
            tokens = torch.randint(self.config.vocab_size, shape, generator=generator)[ctx.rank].to(ctx.device)
            yield [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens]


class Stage:
    def __init__(self, name: str, job: Job, ctx: dist.Context) -> None:
        self.name, self.job, self.ctx = name, job, ctx
        settings = job.settings(name)
        model = engine.build(job.config, settings, ctx, seq_len=job.seq_len, seed=job.seed)
        self.zero = engine.initialize(model, settings, ctx)

    def backward(self, batch: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        loss = zero_peers.backward(self.zero, batch, self.job.tokens, self.ctx.world_size)
        torch.distributed.all_reduce(loss)
        return loss

    def train(self, batch: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
        loss = self.backward(batch)
        return float(loss), float(zero_peers.update(self.zero))

    def states(self) -> zero_peers.Held:
        if self.zero.zero_optimization():
            return zero_peers.states(self.zero)
        parameters = list(self.zero.module.parameters())
        wrapped = getattr(self.zero.optimizer, "optimizer", self.zero.optimizer)  # in bf16: of the float32 copy
        return {
            "parameters": [p.data for p in parameters],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [x for held in wrapped.state.values() for x in held.values() if torch.is_tensor(x)],
            "master": [p.data for group in wrapped.param_groups for p in group["params"]],
        }

    def close(self) -> None:
        self.zero.destroy()
        del self.zero
        gc.collect()


def weigh(name: str, job: Job) -> dict[str, Any]:
    """On a rank of its own processes: bytes by kind, the peak of a step over that of a tiny model, collectives."""
    with dist.session(job.device, timeout_s=90, threads=1) as ctx:
        resident.return_at_once()
        tiny = narrowed(lm.config("nano", job.seq_len), 64)
        tiny.num_hidden_layers = 1
        tiny.vocab_size = job.config.vocab_size
        small = Job(tiny, **{f: getattr(job, f) for f in ("ranks", "micro_batch", "accumulation", "seq_len", "device")})
        first = Stage(name, small, ctx)
        first.train(next(small.batches(ctx)))
        first.close()
        before = profiling.memory(ctx.device).current
        stage, batches = Stage(name, job, ctx), job.batches(ctx)
        for _ in range(WARM_UP):
            stage.train(next(batches))
        profiling.reset_peak_memory(ctx.device)
        stage.backward(next(batches))
        held = contestants.held_bytes(stage)  # type: ignore[arg-type]
        zero_peers.update(stage.zero)
        peak = profiling.memory(ctx.device).peak - before
        with Traffic() as traffic:
            loss = zero_peers.backward(stage.zero, next(batches), job.tokens, ctx.world_size)
            zero_peers.update(stage.zero)
        sent = sum(call.sent_bytes for call in traffic.seen)
        return {"held": held, "peak": peak, "sent": sent, "calls": len(traffic.seen), "loss": float(loss)}


def race(names: tuple[str, ...], job: Job, rounds: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """All are alive and take turns, in an order drawn anew each round: losses, norms and milliseconds of each."""
    with dist.session(job.device, timeout_s=90, threads=1) as ctx:
        order = random.Random(seed)  # the same on all ranks
        alive = {name: Stage(name, job, ctx) for name in names}
        found: dict[str, dict[str, list[float]]] = {name: {"losses": [], "norms": [], "ms": []} for name in names}
        batches = job.batches(ctx)
        for number in range(WARM_UP + rounds):
            batch = next(batches)
            for name in order.sample(names, len(names)):
                said: list[tuple[float, float]] = []
                ms = timed_ms(partial(_note, said, alive[name], batch), ctx.device)
                found[name]["losses"].append(said[-1][0])
                found[name]["norms"].append(said[-1][1])
                if number >= WARM_UP:
                    found[name]["ms"].append(ms)
        for stage in alive.values():
            stage.close()
        return found


def _note(said: list[tuple[float, float]], stage: Stage, batch: Any) -> None:
    said.append(stage.train(batch))


def predicted(name: str, job: Job) -> dict[str, float]:
    """Bytes of a rank by kind, and the planner's peak of a step; what it sends."""
    parameters = lm.parameter_count(job.config)
    held = contestants.ideal_bytes(LIKE[name], parameters, job.ranks, job.dtype)
    master = 4 * parameters / job.ranks  # DeepSpeed's optimizer steps on a float32 copy, also of float32 weights
    if name != "0":
        held["master"] = master
    elif job.dtype != torch.float32:
        held = {kind: parameters * size for kind, size in contestants.ZERO_BF16.items()}
    width = job.dtype.itemsize
    sent = contestants.sent_bytes(
        LIKE[name], summed=width * parameters, gathered=width * parameters, ranks=job.ranks,
        micro_batches=job.accumulation,
    )  # fmt: skip
    if name == "3, freed" and job.config.tie_word_embeddings:  # gathered for each of its uses: embedding, head
        embedding = job.config.vocab_size * job.config.hidden_size
        sent += 2 * job.accumulation * (job.ranks - 1) / job.ranks * width * embedding
    if name not in PLANNED:
        return held | {"sent": sent}
    setting = Setting(
        PLANNED[name], ranks=job.ranks, micro_batch=job.micro_batch, seq_len=job.seq_len, accumulate=job.accumulation,
        dtype=job.dtype, device="cuda" if torch.cuda.is_available() and job.device != "cpu" else "cpu",
    )  # fmt: skip
    peak = float(budget(job.config, setting).peak)
    if name != "0":  # the planner takes DeepSpeed's defaults, and ours are smaller
        bucket = job.settings(name)["zero_optimization"]["reduce_bucket_size"]
        peak += width * (bucket - REDUCE_BUCKET) + (master if job.dtype == torch.float32 else 0)
    if name == "3, freed":
        peak -= width * min(parameters, PREFETCH_BUCKET)
    return held | {"sent": sent, "peak": peak}

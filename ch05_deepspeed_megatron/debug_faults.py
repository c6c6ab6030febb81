"""The faults of debug_deepspeed.py, each caused for real with DeepSpeed, with its fix in the comment beside it.

Each is called on every rank: fault(ctx, args) -> Verdict or None, or ends in the Fault of chapter 3's watch.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ch03_ddp import step as ddp_step
from ch04_fsdp import memory_cap, resident, zero_peers
from ch05_deepspeed_megatron import debug_verdicts, ops
from ch05_deepspeed_megatron import engine as engines
from ch05_deepspeed_megatron.debug_verdicts import FirstNotFinite, Step, Verdict, part
from common import lm
from common.dist import Context

SEQ_LEN = 32
STEPS = 6
ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}
PLAIN: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "optimizer": ADAM}


def config_of(layers: int = 2, hidden: int = 64) -> Any:
    made = lm.config("nano", SEQ_LEN)
    made.hidden_size, made.intermediate_size, made.num_hidden_layers = hidden, 11 * hidden // 4, layers
    made.num_attention_heads = made.num_key_value_heads = max(1, hidden // 64)
    made.head_dim = hidden // made.num_attention_heads
    return made


def start(settings: dict[str, Any], ctx: Context, config: Any = None) -> Any:
    config = config or config_of()
    return engines.initialize(engines.build(config, settings, ctx, seq_len=SEQ_LEN), settings, ctx)


def batch(ctx: Context, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(512, (rows, SEQ_LEN + 1), device=ctx.device)
    return tokens[:, :-1], tokens[:, 1:]


def train(engine: Any, ctx: Context) -> torch.Tensor:
    """A step. Returns its loss."""
    inputs, targets = batch(ctx)
    loss = ddp_step.loss_sum(engine, inputs, targets) / targets.numel()
    engine.backward(loss)
    engine.step()
    return loss.detach()


# ---------------------------------------------------------------- the config

BAD: dict[str, dict[str, Any]] = {
    # fix: 4 = 2 a micro-batch x 2 micro-batches x 1 rank, or leave one of the three out
    "batch-sizes": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    "two-precisions": {"bf16": {"enabled": True}, "fp16": {"enabled": True}},  # fix: one of them
    "offload-stage-0": {
        "zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}
    },  # fix: stage 1, 2, 3
    "unknown-key": {"gradient_clipping": None, "gradient_cliping": 0.5},  # fix: spell it right
}
MISTAKEN = {  # the key that is to be named
    "batch-sizes": "train_batch_size", "two-precisions": "fp16",
    "offload-stage-0": "zero_optimization.offload_optimizer", "unknown-key": "gradient_cliping",
}  # fmt: skip


def bad_config(name: str, ctx: Context) -> Verdict | None:
    """Two of the four DeepSpeed takes without a word: what it does goes with the verdict."""
    settings = {key: value for key, value in (PLAIN | BAD[name]).items() if value is not None}
    try:
        engine = start(settings, ctx)
        zero = engine.zero_offload_optimizer() if engine.zero_optimization() else None
        says = (
            f"DeepSpeed trains on, clipping at {engine.gradient_clipping()}, offloading {'it' if zero else 'nothing'}"
        )
    except (AssertionError, ValueError, RuntimeError) as error:
        says = f"DeepSpeed: {' '.join(str(error).split())[:90]}"
    verdict = debug_verdicts.of_config(settings, ctx.world_size)
    return verdict and Verdict(verdict.cause, verdict.text, f"{verdict.cure} ({says})")


# ---------------------------------------------------------------- memory

# By stage: rows of the micro-batch, the cap in bytes a parameter, and what will not fit on two ranks
CAPS = {0: (1, 17.5, "gradients"), 1: (1, 3.0, "parameters"), 2: (1, 11.5, "optimizer"), 3: (400, 13.5, "activations")}


def no_room(stage: int, ctx: Context, capped_as: int | None = None) -> Verdict | None:
    """Two steps under the cap of this fault, or of another stage's: does that one's cure cure it?"""
    config = config_of(layers=4, hidden=512)
    rows, a_parameter, _ = CAPS[stage if capped_as is None else capped_as]
    _memory_run(stage, config_of(layers=1), 1, ctx)  # code, threads and buffers are there before the cap is
    gc.collect()
    resident.return_at_once()
    parameters = lm.parameter_count(config)
    cap = int(a_parameter * parameters)
    try:
        with memory_cap.limited(cap, ctx.device):
            _memory_run(stage, config, rows, ctx)  # BUG: too large. fix: what the verdict says
    except debug_verdicts.NoRoom as lost:
        return debug_verdicts.of_memory(lost, parameters, stage, ctx.world_size, cap, 8 * 2**20)
    return None


def _memory_run(stage: int, config: Any, rows: int, ctx: Context) -> None:
    hidden = config.hidden_size
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 3 * hidden * hidden}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": 3 * hidden * hidden, "stage3_param_persistence_threshold": 10 * hidden}
    settings = PLAIN | {"zero_optimization": zero}
    with part("parameters"):
        model = engines.build(config, settings, ctx, seq_len=SEQ_LEN)
    with part("optimizer" if stage else "parameters"):
        engine = engines.initialize(model, settings, ctx)
    inputs, targets = batch(ctx, rows)
    for _ in range(2):  # the first makes the optimizer's state
        with part("activations"):
            loss = ddp_step.loss_sum(engine, inputs, targets) / targets.numel()
        with part("gradients"):
            engine.backward(loss)
        with part("optimizer"):
            engine.step()
    engine.destroy()


# ---------------------------------------------------------------- hangs


def skipped_collective(ctx: Context, watch: Any, guilty: int) -> None:
    engine = start(PLAIN | {"zero_optimization": {"stage": 2}}, ctx)
    for number in range(STEPS):
        loss = train(engine, ctx)
        if not (ctx.rank == guilty and number == 3):  # BUG: a branch that depends on the rank, around a collective
            torch.distributed.all_reduce(loss)  #       fix: all ranks reduce, rank 0 prints
        loss.item()


def uneven_steps(ctx: Context, watch: Any, guilty: int) -> None:
    engine = start(PLAIN | {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}, ctx)
    for _ in range(STEPS - 2 * (ctx.rank == guilty)):  # BUG: this rank's share of the data is shorter
        train(engine, ctx)  #                            fix: drop the last ones; under ZeRO-3 forward is a collective


# DeepSpeed sums in a process group of its own. So the rank that skipped a call of the world's group goes on to wait in
# another one: to the watch, two ranks whose calls are in another order.
HANGS = {"skipped-collective": (skipped_collective, "order"), "uneven-steps": (uneven_steps, "uneven")}
HANG_CURES = {"uneven": "give all ranks equally many batches: under ZeRO-3 each pass is a collective (Join is DDP's)"}


# ---------------------------------------------------------------- numbers


def half_precision(ctx: Context, scale_power: int) -> Any:
    if ctx.device.type == "cpu":
        allow_float16_on_cpu()
    fp16 = {"enabled": True, "initial_scale_power": scale_power, "hysteresis": 1}
    return start(PLAIN | {"fp16": fp16, "zero_optimization": {"stage": 2}}, ctx)


def allow_float16_on_cpu() -> None:
    """The CPU shim: DeepSpeed refuses float16 on CPUs that do not multiply it natively. torch does it, slowly."""
    zero_peers.library(torch.device("cpu"))
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def watched_steps(engine: Any, ctx: Context, steps: int) -> Verdict | None:
    """Train, and ask of what was seen."""
    seen, watch = [], FirstNotFinite(engine.module)
    for _ in range(steps):
        scale, skipped = float(engine.optimizer.loss_scale), engine.skipped_steps
        loss = train(engine, ctx)
        seen.append(Step(loss.item(), scale, engine.skipped_steps > skipped))
        if not math.isfinite(seen[-1].loss):
            break
    watch.remove()
    return debug_verdicts.of_numbers(seen, watch.name)


def overflow(ctx: Context) -> Verdict | None:
    return watched_steps(half_precision(ctx, scale_power=24), ctx, 12)  # BUG: so high. fix: 16, or none at all: bf16


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()  # BUG: of what may be negative. fix: clamp, or another activation


def nan(ctx: Context) -> Verdict | None:
    engine = half_precision(ctx, scale_power=12)
    engine.module.model.layers[1].mlp.act_fn = Root()
    return watched_steps(engine, ctx, 4)


def healthy(ctx: Context) -> Verdict | None:
    """Nothing is wrong, and nothing is found."""
    return watched_steps(half_precision(ctx, scale_power=10), ctx, 4)


NUMBERS = {"overflow": overflow, "nan": nan, "none": healthy}

# ---------------------------------------------------------------- offload

GOOD_AIO = {"block_size": 2**20, "queue_depth": 8, "single_submit": False, "overlap_events": True}
SLOW_AIO = {"block_size": 4096, "queue_depth": 1, "single_submit": True, "overlap_events": False}  # fix: GOOD_AIO


def offloaded(folder: Path | None, aio: dict[str, Any], ctx: Context, steps: int = 4) -> tuple[float, int, int]:
    """Seconds of an optimizer step, bytes it reads and writes. folder: None keeps the optimizer in memory."""
    where = {"device": "nvme", "nvme_path": str(folder)} if folder else {"device": "cpu"}
    zero = {"stage": 3, "offload_optimizer": where | {"pin_memory": False, "buffer_count": 4}, "sub_group_size": 10**6}
    settings = PLAIN | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": zero, "aio": aio}
    engine = start(settings, ctx, config_of(layers=4, hidden=256))
    seconds, moved = [], (0, 0)
    for _ in range(steps):
        inputs, targets = batch(ctx)
        engine.backward(ddp_step.loss_sum(engine, inputs, targets) / targets.numel())
        before, begin = psutil.Process().io_counters(), time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
        after = psutil.Process().io_counters()
        moved = (after.read_bytes - before.read_bytes, after.write_bytes - before.write_bytes)
    engine.destroy()
    return statistics.median(seconds[1:]), *moved


def slow_offload(ctx: Context, folder: Path | None) -> Verdict | None:
    ops.build([ops.ADAM, ops.AIO], ctx.device)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        in_memory, _, _ = offloaded(None, GOOD_AIO, ctx)
        well, read, written = offloaded(Path(made), GOOD_AIO, ctx)
        speed = (read + written) / max(well - in_memory, 1e-3)
        slow, read, written = offloaded(Path(made), SLOW_AIO, ctx)
    return debug_verdicts.of_offload(slow, in_memory, read, written, speed, speed)

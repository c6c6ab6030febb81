"""Is the memory plan right? Train over a grid of models and settings, and lay the measured peak beside the planned one.

You learn   which phase of a step is the peak and why it moves (logits, activations, gathered weights, gradients), how
            to measure the real memory of a CPU process, what a plan cannot see
Laptop      python ch04_fsdp/measure_budget.py
Briefly     python ch04_fsdp/measure_budget.py --grid smoke
One cell    python ch04_fsdp/measure_budget.py --cells deep:full:2:recompute=block:micro_batch=4
GPU node    python ch04_fsdp/measure_budget.py --ranks 8 --presets small,1b --seq-len 1024
You see     a row a cell: planned and measured MiB and the error; RESULT has the largest error and the median

On a GPU the measure is the caching allocator's peak. A CPU has no such counter, but the kernel keeps a process's
largest resident set (VmHWM). It is the truth if three things are seen to: glibc must give freed tensors back at once
(resident.py), every cell needs processes of its own, and what is not the model's (code pages, gloo's
connections, scratch space of the matrix library) must be there before the baseline is taken: a model of the same
width with one layer trains a step first.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp import model as models
from ch04_fsdp import resident, step
from ch04_fsdp.budget import budget
from ch04_fsdp.setting import Setting
from ch04_fsdp.sharding import Sharding
from common import dist, lm, profiling, ranks, script
from common.logs import get_logger
from common.script import UserError, at_least, comma_list

log = get_logger()
MIB = 2**20
MEASURED = ("micro_batch", "seq_len", "accumulate", "sync_each", "dtype", "recompute", "prefetch", "shard_ranks")
PRESETS: dict[str, dict[str, Any]] = {  # where the memory is differs from one to the other
    "deep": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 6,
             "num_key_value_heads": 6, "vocab_size": 2048, "tie_word_embeddings": True},
    "wide": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12,
             "num_key_value_heads": 4, "vocab_size": 4096, "tie_word_embeddings": False},
    "words": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": 32768, "tie_word_embeddings": True},
}  # fmt: skip
# One with recomputation: tests/test_fsdp_budget.py
SMOKE = ["deep:replicate:1", "deep:full:2", "wide:grad:2", "words:replicate:2"]
GRID = [
    "nano:replicate:2", "nano:full:2",
    *(f"{preset}:{strategy}" for preset in ("deep", "wide", "words")
      for strategy in ("replicate:1", "replicate:2", "full:2", "grad:2")),
    *(f"deep:full:2:recompute={choice}" for choice in ("block", "every-2", "mlp", "ops")),
    "deep:replicate:1:recompute=ops", "deep:replicate:1:recompute=every-2",
    "wide:full:1", "wide:hybrid:4:shard_ranks=2", "wide:hybrid-grad:2:shard_ranks=1",
    "wide:full:2:accumulate=2", "wide:full:2:accumulate=2:sync_each=1", "wide:full:2:prefetch=2",
    "deep:full:2:micro_batch=4", "deep:full:2:seq_len=1024:micro_batch=1", "words:full:2:micro_batch=1:recompute=block",
    "deep:full:2:dtype=bf16", "wide:grad:2:dtype=bf16:recompute=mlp", "wide:replicate:1:dtype=bf16",
    "words:replicate:2:dtype=bf16:recompute=block",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    preset: str
    setting: Setting

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> Cell:
        """preset:strategy:ranks:name=value:...

        Raises:
            UserError: it is not of this form, or there is no such preset or setting.
        """
        try:
            preset, strategy, count, *more = text.split(":")
            given = dict(one.split("=", 1) for one in more)
            if unknown := given.keys() - MEASURED:
                raise ValueError(f"{min(unknown)} is not measured here, only {', '.join(MEASURED)}")
            values: dict[str, Any] = {"strategy": strategy, "ranks": int(count), **defaults}
            for name, value in given.items():
                kind = type(getattr(Setting(), name)) if name != "shard_ranks" else int
                values[name] = (
                    training.DTYPES[value] if name == "dtype" else kind(int(value) if kind is bool else value)
                )
        except (ValueError, AttributeError, KeyError) as error:
            raise UserError(f"cannot read the cell {text!r} ({error}); write deep:full:2:recompute=block") from None
        if wrong := [name for name, value in values.items() if type(value) is int and value < 1]:
            raise UserError(f"{wrong[0]} is {values[wrong[0]]} in the cell {text!r}; take 1 or more")
        cell = cls(preset, Setting(**values))
        cell.sharding()
        return cell

    def config(self) -> Any:
        made = lm.config("nano" if self.preset in PRESETS else self.preset, self.setting.seq_len)
        for name, value in PRESETS.get(self.preset, {}).items():
            setattr(made, name, value)
        made.head_dim = made.hidden_size // made.num_attention_heads
        return made

    def sharding(self) -> Sharding:
        s = self.setting
        return Sharding(s.strategy, s.shard_ranks, s.dtype, s.recompute, s.offload, s.prefetch)

    def __str__(self) -> str:
        s, plain = self.setting, Setting()
        shown = ("shard_ranks", "recompute", "accumulate", "sync_each", "prefetch", "offload")
        other = [f"{name}={getattr(s, name)}" for name in shown if getattr(s, name) != getattr(plain, name)]
        return " ".join([f"{s.micro_batch} x {s.seq_len}", *other, str(s.dtype).removeprefix("torch.")])


def train(config: Any, cell: Cell, ctx: dist.Context, steps: int) -> None:
    """Some steps on random tokens. The peak is that of the steps after the first, which makes the optimizer's state."""
    s, sharding = cell.setting, cell.sharding()
    wrapped = models.build(config, sharding, ctx, seq_len=s.seq_len)
    optimizer = training.make_optimizer(models.inner(wrapped), lr=1e-3)
    ids = torch.randint(config.vocab_size, (s.micro_batch, s.seq_len + 1), device=ctx.device)
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    tokens = s.accumulate * batch[0].numel() * ctx.world_size
    for number in range(steps):
        if number == 1:
            profiling.reset_peak_memory(ctx.device)
        step.backward(wrapped, [batch] * s.accumulate, tokens, ctx.world_size, sharding, sync_each=s.sync_each)
        step.update(wrapped, optimizer, max_norm=1.0)


def measure(cell: Cell) -> int:
    """On each rank: its peak in bytes over what the process held before there was a model."""
    resident.return_at_once()
    with dist.session(cell.setting.device) as ctx:
        small, config = cell.config(), cell.config()
        small.num_hidden_layers = 1
        train(small, cell, ctx, steps=1)
        gc.collect()
        resident.return_at_once()  # trims, too
        base = profiling.memory(ctx.device).current
        train(config, cell, ctx, steps=3)
        return profiling.memory(ctx.device).peak - base


def grid(args: Any, device: str) -> list[Cell]:
    if args.cells:
        texts = args.cells
    elif args.presets:
        texts = [f"{preset}:{strategy}:{args.ranks}:recompute={choice}" for preset in args.presets
                 for strategy in ("full", "grad", "replicate") for choice in ("none", "block")]  # fmt: skip
    else:
        texts = SMOKE if args.grid == "smoke" else GRID
    defaults = {"micro_batch": args.micro_batch, "seq_len": args.seq_len, "dtype": torch.float32, "device": device}
    cells = [Cell.parse(text, **defaults) for text in texts]
    for cell in cells:
        budget(cell.config(), cell.setting)  # what cannot be planned is found before anything is started
        if device == "cuda" and cell.setting.ranks > torch.cuda.device_count():
            raise UserError(f"{cell.setting.ranks} ranks need as many GPUs; take fewer --ranks, or --device cpu")
    return cells


def main(argv: list[str] | None = None) -> dict:
    made = script.parser(__doc__)
    made.add_argument("--grid", choices=("full", "smoke"), default="full")
    made.add_argument("--cells", type=comma_list(str), help="preset:strategy:ranks:name=value..., comma separated")
    made.add_argument(
        "--presets", type=comma_list(str), help=f"instead of the grid: of {', '.join(PRESETS)} or the book's"
    )
    made.add_argument("--ranks", type=at_least(1), default=2, help="with --presets")
    made.add_argument("--micro-batch", type=at_least(1), default=2)
    made.add_argument("--seq-len", type=at_least(2), default=256)
    made.add_argument("--plot", action="store_true", help="draw planned against measured into the run folder")
    args = made.parse_args(argv)
    run = script.start(__file__, args)
    device = dist.pick_device(args.device, dist.Launch("python")).type
    if device == "cpu" and not sys.platform.startswith("linux"):
        raise UserError("the peak of a CPU process is read from Linux's /proc; run this on Linux or on a GPU")
    ranks.preload("ch04_fsdp.measure_budget", "transformers.models.llama.modeling_llama")
    rows: list[dict[str, Any]] = []
    print(f"{'preset':8}{'strategy':12}{'ranks':>5}{'planned':>9}{'measured':>10}{'error':>8}  {'peak in':26}setting")
    for cell in grid(args, device):
        planned = budget(cell.config(), cell.setting)
        measured = max(ranks.values(ranks.run_ranks(measure, cell.setting.ranks, cell, timeout_s=120)))
        error = planned.peak / measured - 1
        rows.append({"preset": cell.preset, **dataclasses.asdict(cell.setting), "dtype": str(cell.setting.dtype),
                     "planned_mib": planned.peak / MIB, "measured_mib": measured / MIB, "error": error})  # fmt: skip
        print(
            f"{cell.preset:8}{cell.setting.strategy:12}{cell.setting.ranks:5}{planned.peak / MIB:9.1f}"
            f"{measured / MIB:10.1f}{100 * error:+7.1f}%  {planned.phase:26}{cell}",
            flush=True,
        )
        run.log(**rows[-1])
    errors = sorted(abs(row["error"]) for row in rows)
    if args.plot:
        plot(rows, run.path("planned_and_measured.png"))
    return {
        "cells": len(rows),
        "device": device,
        "error_percent_max": 100 * errors[-1],
        "error_percent_median": 100 * statistics.median(errors),
        "measured_mib_min": min(row["measured_mib"] for row in rows),
        "measured_mib_max": max(row["measured_mib"] for row in rows),
    }


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5.4), layout="constrained")
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        some = [row for row in rows if row["strategy"] == strategy]
        axes.plot([r["measured_mib"] for r in some], [r["planned_mib"] for r in some], "o", label=strategy, alpha=0.7)
    low, high = (pick(row["measured_mib"] for row in rows) for pick in (min, max))
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color="#dddddd", label="10 %")
    axes.set(xlabel="measured peak (MiB)", ylabel="planned peak (MiB)", xscale="log", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    script.run(main)

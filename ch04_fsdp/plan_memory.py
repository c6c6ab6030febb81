"""Will it fit? The memory of every way to spread a model over N ranks, before any of them is started.

You learn   what takes the memory in DDP, ZeRO-1/2/3 and FSDP, in which phase of a step the peak lies, what each remedy
            (sharding, recomputation, offload, tensor and pipeline parallelism) brings, and what it costs
Laptop      python ch04_fsdp/plan_memory.py --preset 8b --gpu H100-80G --ranks 8
Search      python ch04_fsdp/plan_memory.py --preset 8b --gpu A100-40G --ranks 8 --search
Your model  python ch04_fsdp/plan_memory.py --preset FOLDER_OR_HUB_ID --memory-gib 22 --ranks 4 --recompute none
GPU node    the same; without --gpu and --memory-gib the memory of the GPU that is there
You see     a row a strategy: the components at the peak, the phase it lies in, whether it fits, and the largest
            micro-batch and sequence that do

The formulas are in setting.py (states), activations.py and budget.py; measure_budget.py checks them. On top of the plan
comes a reserve, which is an assumption: 1.5 GiB for the CUDA context, libraries and NCCL, and for fragmentation a tenth
of what comes and goes in a step (states are allocated once). No GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp import recompute
from ch04_fsdp.budget import Budget, budget
from ch04_fsdp.setting import NO_PIPELINE, OPTIMIZER_BYTES, STRATEGIES, Setting, part
from ch04_fsdp.sharding import OFFLOADS
from common import lm, script
from common.script import UserError, at_least, comma_list, positive

GIB = 2**30
GPUS = {  # MiB, as nvidia-smi names the total
    "T4": 15360, "V100-16G": 16384, "V100-32G": 32768, "A10": 23028, "L4": 23034, "RTX-3090": 24576, "RTX-4090": 24564,
    "L40S": 46068, "A100-40G": 40960, "A100-80G": 81920, "H100-80G": 81559, "H100-NVL": 95830, "H200": 143771,
    "B200": 183359,
}  # fmt: skip
CONTEXT, FRAGMENTATION = 1.5 * GIB, 0.1
COLUMNS = ("parameters", "optimizer", "gradients", "gathered weights", "communication", "activations", "temporaries",
           "buffers")  # fmt: skip


def reserve(plan: Budget) -> float:
    states = sum(plan.between.values())
    return CONTEXT + FRAGMENTATION * max(0, plan.peak - states)


def need(config: Any, setting: Setting) -> float:
    """Bytes of GPU memory, with the reserve."""
    plan = budget(config, setting)
    return plan.peak + reserve(plan)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` that fits, if all smaller ones do; 0 if none."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_micro_batch(config: Any, setting: Setting, memory: float) -> int:
    return largest(lambda n: need(config, dataclasses.replace(setting, micro_batch=n)) <= memory, 4096)


def largest_sequence(config: Any, setting: Setting, memory: float) -> int:
    """In steps of 256 positions, with one sequence a micro-batch."""
    one = dataclasses.replace(setting, micro_batch=1)
    return 256 * largest(lambda n: need(config, dataclasses.replace(one, seq_len=256 * n)) <= memory, 4096)


def extra_compute(config: Any, choice: str) -> float:
    """What recomputation adds to a step's FLOPs: forward is a third of them. ops: no product, but memory traffic."""
    if choice.startswith("every-"):
        return 1 / 3 / int(choice[6:])
    one = part(config, Setting(ranks=1))
    mlp = 3 * config.hidden_size * config.intermediate_size / one.layer
    return {"none": 0.0, "block": 1 / 3, "mlp": mlp / 3, "ops": 0.05}[choice]


def wire_bytes_per_token(config: Any, s: Setting) -> float:
    """What a rank sends for each of its tokens in a step: rings, (N-1)/N taken for 1 where there is more than one."""
    here, p, tokens = part(config, s), s.weight, s.micro_batch * s.seq_len
    count = here.total
    shards, copies = s.shards > 1, s.replicas > s.shards
    passes = s.accumulate if s.is_fsdp or s.strategy == "zero3" else 1  # gathered for each micro-batch
    again = here.layer * here.layers if s.is_fsdp else count  # FSDP: see traffic.expected
    gathers = p * (count + again * s.reshards) * passes
    sent = {
        "replicate": 2 * 4 * count * (s.replicas > 1),
        "zero1": 3 * p * count * shards,  # an all-reduce, and the new weights
        "zero2": 2 * p * count * shards,
        "zero3": (gathers + p * count) * shards,
    }.get(s.strategy, (gathers + 4 * count) * shards + 2 * 4 * count / s.shards * copies)
    layers = config.num_hidden_layers / s.pp
    width = config.hidden_size * (4 if s.dtype == torch.float32 else 2)
    inside = 4 * 2 * layers * width * (s.tp > 1) + 2 * width * (s.pp > 1)
    return sent / (tokens * s.accumulate) + inside


def divides(config: Any, tp: int) -> bool:
    try:
        part(config, Setting(ranks=tp, tp=tp))
    except UserError:
        return False
    return True


def search(config: Any, base: Setting, memory: float) -> Iterator[tuple[tuple[float, ...], Setting, float]]:
    """Every setting that fits, with its largest micro-batch; its cost: (offload, extra compute, bytes a token)."""
    tps = [n for n in (1, 2, 4, 8) if base.ranks % (n * base.pp) == 0 and divides(config, n)]
    choices = ("none", "ops", "mlp", "every-2", "block")
    for strategy, again, offload, tp in itertools.product(STRATEGIES, choices, ("none", "cpu"), tps):
        if (offload != "none" and strategy == "replicate") or strategy.startswith("hybrid"):
            continue  # hybrid takes as much memory as full on fewer ranks: a matter of links, not of memory
        if base.pp > 1 and strategy in NO_PIPELINE:
            continue
        if base.ranks // (tp * base.pp) == 1 and strategy not in ("replicate", "full"):
            continue  # one replica: there is nothing to spread
        setting = dataclasses.replace(
            base, strategy=strategy, recompute=again, offload=offload, tp=tp, shard_ranks=None
        )
        micro_batch = min(largest_micro_batch(config, setting, memory), 64)
        if micro_batch:
            found = dataclasses.replace(setting, micro_batch=micro_batch)
            cost = (float(offload != "none"), extra_compute(config, again), wire_bytes_per_token(config, found))
            yield cost, found, need(config, found)


def memory_of(args: argparse.Namespace) -> float:
    """Bytes of one GPU.

    Raises:
        UserError: it is not known.
    """
    if args.memory_gib:
        return args.memory_gib * GIB
    if args.gpu:
        if args.gpu not in GPUS:
            raise UserError(f"no GPU {args.gpu!r} in the table; take one of {', '.join(GPUS)}, or pass --memory-gib")
        return GPUS[args.gpu] * 2**20
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    raise UserError("there is no GPU here whose memory to take; pass --gpu (such as H100-80G) or --memory-gib")


def parse(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument("--preset", default="8b", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    made.add_argument("--gpu", help=", ".join(GPUS))
    made.add_argument("--memory-gib", type=positive, help="instead of --gpu")
    made.add_argument("--ranks", type=at_least(1), default=8, help="all: replicas x tp x pp")
    made.add_argument("--shard-ranks", type=at_least(1), help="hybrid: ranks that share a copy (default: half of them)")
    made.add_argument("--tp", type=at_least(1), default=1, help="tensor-parallel ranks")
    made.add_argument("--pp", type=at_least(1), default=1, help="pipeline stages (1F1B, --accumulate micro-batches)")
    made.add_argument("--strategies", type=comma_list(str), help=f"default: all of {', '.join(STRATEGIES)} that go")
    made.add_argument("--micro-batch", type=at_least(1), default=1)
    made.add_argument("--seq-len", type=at_least(1), default=4096)
    made.add_argument("--accumulate", type=at_least(1), default=1, help="micro-batches a step")
    made.add_argument("--sync-each", action="store_true", help="FSDP: reduce after each micro-batch")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    made.add_argument("--recompute", default="block", help=", ".join(recompute.CHOICES))
    made.add_argument("--offload", choices=OFFLOADS, default="none")
    made.add_argument("--prefetch-layers", type=at_least(1), default=1)
    made.add_argument("--optimizer", choices=tuple(OPTIMIZER_BYTES), default="adamw")
    made.add_argument("--search", action="store_true", help="what fits, cheapest first, instead of the table")
    made.add_argument("--show", type=at_least(1), default=12, help="with --search: rows")
    made.add_argument("--phases", action="store_true", help="also the peak of each phase")
    return made.parse_args(argv)


def settings(args: argparse.Namespace) -> list[Setting]:
    """One a strategy. Replicate has nothing to offload: it is left as it is."""
    replicas = args.ranks // (args.tp * args.pp)
    made = []
    for strategy in args.strategies or [s for s in STRATEGIES if args.pp == 1 or s not in NO_PIPELINE]:
        hybrid = (args.shard_ranks or max(1, replicas // 2)) if strategy.startswith("hybrid") else None
        made.append(
            Setting(
                strategy, args.ranks, hybrid, args.tp, args.pp, args.micro_batch, args.seq_len, args.accumulate,
                args.sync_each, training.DTYPES[args.dtype], args.recompute,
                "none" if strategy == "replicate" else args.offload, args.prefetch_layers, args.optimizer,
            )
        )  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    memory = memory_of(args)
    config = lm.config(args.preset, args.seq_len)
    run = script.start(__file__, args)
    base = settings(args)
    plans = [budget(config, setting) for setting in base]
    count = lm.parameter_count(config)
    print(
        f"{args.preset}: {count / 1e9:.2f} B parameters on {args.ranks} ranks of {memory / GIB:.1f} GiB, "
        f"{args.micro_batch} x {args.seq_len} tokens a micro-batch, {args.dtype}, recompute {args.recompute}"
    )
    if args.search:
        return searched(config, base[0], memory, args.show)
    result: dict[str, Any] = {"parameters": count, "memory_gib": memory / GIB, "peak_gib": {}, "fits": [],
                              "largest_micro_batch": {}, "largest_seq_len": {}}  # fmt: skip
    heads = ("params", "optim.", "grads", "gathered", "comm.", "activ.", "temp.", "buffers")
    print(f"{'GiB a rank':12}" + "".join(f"{name:>9}" for name in heads) + f"{'peak':>8}{'reserve':>9}  fits"
          f"{'batch':>8}{'seq':>8}  peak in")  # fmt: skip
    for setting, plan in zip(base, plans, strict=True):
        total = plan.peak + reserve(plan)
        fits, away = total <= memory, "host" if args.offload == "cpu" else "disk"
        batch, length = largest_micro_batch(config, setting, memory), largest_sequence(config, setting, memory)
        print(
            f"{setting.strategy:12}" + "".join(f"{plan.at_peak.get(name, 0) / GIB:9.2f}" for name in COLUMNS)
            + f"{plan.peak / GIB:8.2f}{reserve(plan) / GIB:9.2f}  {'yes' if fits else 'no':4}{batch:8}{length:8}  "
            + plan.phase
            + (f" of stage {plan.stage}" if args.pp > 1 else "")
            + (f"  ({plan.host / GIB:.1f} GiB on the {away})" if plan.host else "")
        )  # fmt: skip
        if args.phases:
            for name, size in plan.phases.items():
                print(f"    {name:28}{size / GIB:9.2f}")
        result["peak_gib"][setting.strategy] = total / GIB
        result["largest_micro_batch"][setting.strategy] = batch
        result["largest_seq_len"][setting.strategy] = length
        result["fits"] += [setting.strategy] if fits else []
    print("batch: the largest micro-batch at this length; seq: the longest sequence, one a micro-batch (steps of 256)")
    plot(base, plans, memory, run.path("memory_by_strategy.png"), args.preset)
    totals = result["peak_gib"].values()
    return result | {"strategies_that_fit": len(result["fits"]), "least_gib": min(totals), "most_gib": max(totals)}


def searched(config: Any, base: Setting, memory: float, show: int) -> dict:
    found = sorted(search(config, base, memory), key=lambda row: row[0])
    print(f"{len(found)} settings fit. Cheapest first: without offload, with least computed twice, with fewest bytes")
    print(
        f"{'strategy':12}{'tp':>3}  {'recompute':10}{'offload':8}{'batch':>6}{'GiB':>8}{'extra FLOPs':>13}  MB a token"
    )
    for cost, setting, total in found[:show]:
        print(
            f"{setting.strategy:12}{setting.tp:3}  {setting.recompute:10}{setting.offload:8}{setting.micro_batch:6}"
            f"{total / GIB:8.1f}{100 * cost[1]:12.0f}%{cost[2] / 1e6:12.2f}"
        )
    if not found:
        return {"settings_that_fit": 0}
    cost, best, total = found[0]
    chosen = {"strategy": best.strategy, "tp": best.tp, "recompute": best.recompute, "offload": best.offload}
    return {"settings_that_fit": len(found), "peak_gib": total / GIB, "micro_batch": best.micro_batch, **chosen}


def plot(base: list[Setting], plans: list[Budget], memory: float, path: Path, title: str) -> None:
    """The components at the peak, stacked, a bar a strategy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    names, floor = [setting.strategy for setting in base], [0.0] * len(base)
    colors = ("#1f5c99", "#2e7d32", "#b3541e", "#6fa8dc", "#8e7cc3", "#c9c9c9", "#e8d9a8", "#c27ba0", "#777777")
    for kind, color in zip((*COLUMNS, "reserve"), colors, strict=True):
        heights = [(reserve(p) if kind == "reserve" else p.at_peak.get(kind, 0)) / GIB for p in plans]
        axes.bar(names, heights, bottom=floor, color=color, label=kind)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    axes.axhline(memory / GIB, color="black", linewidth=0.8, linestyle="--", label=f"{memory / GIB:.0f} GiB")
    axes.set(ylabel="GiB a rank at the peak", title=f"{title}, {base[0].ranks} ranks")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    script.run(main)

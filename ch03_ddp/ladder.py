"""The optimisation ladder: from a plain loop to the fast one, each change measured against the one before.

You learn   which change brings what on your hardware, which brings nothing, and how to find out where the rest goes
Laptop      torchrun --standalone --nproc-per-node=2 ch03_ddp/ladder.py
Why         torchrun --standalone --nproc-per-node=2 ch03_ddp/ladder.py --profile overlap   (trace, operators)
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/ladder.py --preset small --batch-size 16 \
                --seq-len 2048 --one-at-a-time
Two hosts   python -m ch02_hardware_parallelism.virtual_cluster --rate 1gbit -- ch03_ddp/ladder.py
Cluster     srun python ch03_ddp/ladder.py --preset 1b --batch-size 4 --seq-len 2048 --one-at-a-time
You see     a table and a plot of the rungs: step time, tokens/s, the factor over the rung before and over the first,
            memory, MFU where the peak is known, and losses that agree where the change must not change them

All rungs live in one process and take turns, a few steps a round, in an order drawn anew: a machine that slows down
slows all of them. A factor is the median over the rounds, of two rungs in the same round. Where a model's memory lies
moves its speed by some percent for as long as it lives, so all are built anew several times, in an order drawn anew.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ch01_intro import training
from ch02_hardware_parallelism.training import timed_ms
from ch03_ddp import step_profile
from ch03_ddp.rungs import Rung, Trainee, ladder
from ch03_ddp.step_profile import KINDS, Profile
from common import data, dist, lm, profiling, script
from common.logs import Progress

WARM_UP = 4  # steps: memory is allocated, code compiled, and DDP settles on its buckets
# By how much the losses of a change that changes only the order of sums may differ, and in how many of the first steps:
# training doubles a difference again and again, the more so as low precision rounds it up.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 5e-3}
COMPARED = 10
VERDICTS = {"pays": "pays on this machine", "costs": "costs", "within_noise": "within the noise"}


@dataclass
class Measured:
    """What became of one rung."""

    rung: Rung
    tokens: int  # a step, of all ranks
    warm_up_s: float
    peak_bytes: int
    profile: Profile
    step_ms: list[float] = field(default_factory=list)  # by round
    losses: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def rate(self) -> float:
        return self.tokens / self.median_ms * 1e3

    def over(self, other: Measured) -> list[float]:
        """tokens/s of this over the other's: quartiles of the rounds."""
        share = self.tokens / other.tokens
        ratios = [share * before / now for before, now in zip(other.step_ms, self.step_ms, strict=True)]
        return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def measure(rungs: list[Rung], args: argparse.Namespace, ctx: dist.Context, run: script.Run) -> list[Measured]:
    """Train each rung for the same number of steps: all in turns, or with --one-at-a-time one after the other."""
    rows = data.Blocks(training.load_corpus(args).train, args.seq_len)
    found: dict[str, Measured] = {}
    order = random.Random(args.seed)  # the same on all ranks
    progress, done = Progress(args.starts * args.rounds * len(rungs), "rounds"), 0
    for number in range(args.starts):
        for group in [[rung] for rung in rungs] if args.one_at_a_time else [rungs]:
            alive = {}
            for rung in order.sample(group, len(group)) if number else group:
                trainee = alive[rung.name] = Trainee(rung, args, rows, ctx)
                warm_up_s = warm_up(trainee)
                if rung.name not in found:
                    found[rung.name] = first_look(trainee, warm_up_s, run.path("trace.json"))
            for _ in range(args.rounds):
                for name in order.sample(list(alive), len(alive)):
                    spent_ms = timed_ms(partial(repeat, alive[name].step, args.steps), ctx.device)
                    found[name].step_ms.append(spent_ms / args.steps)
                    done += 1
                    progress.update(done)
            for name, trainee in alive.items():
                found[name].losses = found[name].losses or trainee.all_losses()
                trainee.close()
            del alive, trainee
            forget(ctx.device)
    return [found[rung.name] for rung in rungs]


def repeat(action: Callable[[], object], times: int) -> None:
    for _ in range(times):
        action()


def warm_up(trainee: Trainee) -> float:
    """The first steps; the seconds that they took."""
    begin = time.perf_counter()
    repeat(trainee.step, WARM_UP)
    trainee.losses[-1].item()  # waits for the device
    return time.perf_counter() - begin


def first_look(trainee: Trainee, warm_up_s: float, trace: Path) -> Measured:
    """Some steps under the profiler, which are not timed."""
    rung, args, ctx = trainee.rung, trainee.args, trainee.ctx
    keep = trace if ctx.is_main and rung.name == args.profile else None
    profile = step_profile.profile(trainee.step, ctx.device, keep=keep)
    tokens = trainee.sequences * args.seq_len
    return Measured(rung, tokens, warm_up_s, trainee.held_bytes() + profile.peak_bytes, profile)


def forget(device: torch.device) -> None:
    """Free the models of one start: a DDP model is part of a cycle, and compiled code counts against a limit."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def loss_differences(found: list[Measured]) -> dict[str, float]:
    """By exact rung: the largest difference of its losses from those of the rung before, over the first steps."""
    differences = {}
    for before, now in pairwise(found):
        if now.rung.effect == "exact":
            apart = np.subtract(now.losses[:COMPARED], before.losses[:COMPARED])
            differences[now.rung.name] = float(np.abs(apart).max())  # NaN stays NaN
    return differences


def check_losses(found: list[Measured], result: dict[str, Any]) -> None:
    """Raises CheckFailed if a change that must not change the training does."""
    differences = loss_differences(found)
    for measured in found:
        name, allowed = measured.rung.name, TOLERANCE[measured.rung.dtype]
        if not differences.get(name, 0) <= allowed:
            raise script.CheckFailed(
                f"with {name!r} the losses differ by {differences[name]:.1e}, more than rounding ({allowed:g})", result
            )


def verdict(quartiles: list[float]) -> str:
    """Of a factor: within the noise where the quartiles lie on both sides of 1."""
    low, _, high = quartiles
    return "pays" if low > 1 else "costs" if high < 1 else "within_noise"


def summary(found: list[Measured], args: argparse.Namespace, ctx: dist.Context) -> dict[str, Any]:
    differences = loss_differences(found)
    result: dict[str, Any] = {
        "world_size": ctx.world_size,
        "rungs": len(found),
        "top_over_baseline": found[-1].over(found[0])[1],
        "largest_loss_difference": float(np.max([0.0, *differences.values()])),
        **{said: [n.rung.name for b, n in pairwise(found) if verdict(n.over(b)) == said] for said in VERDICTS},
        "memory_source": "cuda allocator" if ctx.device.type == "cuda" else "torch.profiler's memory events",
    }  # fmt: skip
    flops = profiling.flops_per_token(lm.config(args.preset, args.seq_len), args.seq_len)
    for before, now in zip([found[0], *found], found, strict=False):
        name, dtype = now.rung.name, training.DTYPES[now.rung.dtype]
        low, middle, high = now.over(before)
        result |= {
            f"{name}_step_ms": now.median_ms,
            f"{name}_tokens_per_s": now.rate,
            f"{name}_x_before": middle,
            f"{name}_x_before_p25": low,
            f"{name}_x_before_p75": high,
            f"{name}_x_baseline": now.over(found[0])[1],
            f"{name}_peak_mem_gib": now.peak_bytes / 2**30,
            f"{name}_loss": now.losses[-1],
            f"{name}_mfu": profiling.mfu(now.rate / ctx.world_size, flops, ctx.device, dtype),
            f"{name}_hidden": now.profile.hidden,
        }
    for now in found:
        if now.rung.name == "compile":  # beyond what as many steps take later
            result["compile_warm_up_s"] = max(0.0, now.warm_up_s - WARM_UP * now.median_ms / 1e3)
    return result


def show(found: list[Measured], result: dict[str, Any], profiled: str | None) -> None:
    """The table of rungs, where the time of each goes, and what does not pay here."""
    print(f"{'rung':13}{'step ms':>9}{'tokens/s':>10}{'x before':>9} {'quartiles':14}{'x first':>8}{'MiB':>7}"
          f"{'MFU':>6}{'loss':>8}  the change")  # fmt: skip
    for measured in found:
        name = measured.rung.name
        low, middle, high = (result[f"{name}_x_before{part}"] for part in ("_p25", "", "_p75"))
        mfu = result[f"{name}_mfu"]
        factors = f"{middle:9.2f} {f'{low:.2f} ... {high:.2f}':14}" if name != found[0].rung.name else f"{'':24}"
        print(f"{name:13}{measured.median_ms:9.1f}{measured.rate:10,.0f}{factors}{result[f'{name}_x_baseline']:8.2f}"
              f"{measured.peak_bytes / 2**20:7,.0f}{'' if mfu is None else f'{mfu:.0%}':>6}{measured.losses[-1]:8.4f}"
              f"  {measured.rung.change}")  # fmt: skip
    print("\nms a step of rank 0, traced  " + "".join(f"{kind:>17}" for kind in KINDS) + f"{'hidden':>9}")
    for measured in found:
        hidden = measured.profile.hidden
        print(f"{measured.rung.name:29}" + "".join(f"{measured.profile.ms[kind]:17.1f}" for kind in KINDS)
              + f"{'' if hidden is None else f'{hidden:.0%}':>9}")  # fmt: skip
    print(f"\nlosses of exact changes agree to {result['largest_loss_difference']:.1e} over {COMPARED} steps")
    print("; ".join(f"{words}: {', '.join(result[said]) or 'none'}" for said, words in VERDICTS.items()))
    if warm_up_s := result.get("compile_warm_up_s"):
        compiled = next(i for i, m in enumerate(found) if m.rung.name == "compile")
        saved_s = (found[compiled - 1].median_ms - found[compiled].median_ms) / 1e3
        back = f"paid back after {warm_up_s / saved_s:,.0f} steps" if saved_s > 0 else "never paid back"
        print(f"compile: {warm_up_s:.1f} s longer until the first steps are done, {back}")
    for measured in found:
        if measured.rung.name == profiled:
            print(f"\n{profiled}: the operators that take longest\n{measured.profile.table}")


def draw(found: list[Measured], result: dict[str, Any], path: Path) -> None:
    """A bar a rung: tokens/s, with the factor over the one before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 0.45 * len(found) + 1.2), layout="constrained")
    names = [measured.rung.name for measured in found]
    factors = [result[f"{name}_x_before"] for name in names]
    shades = {"pays": "#1f5c99", "costs": "#b3541e", "within_noise": "#9db8d2"}
    colors = ["#8a8a8a", *(shades[verdict(now.over(before))] for before, now in pairwise(found))]
    bars = axes.barh(names, [measured.rate for measured in found], color=colors)
    axes.bar_label(bars, ["", *(f"× {factor:.2f}" for factor in factors[1:])], fontsize=9, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="tokens/s", title=f"Each rung changes one thing: {result['top_over_baseline']:.2f} times the first")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    parser.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, or a hub data set id")
    parser.add_argument("--batch-size", type=script.at_least(1), default=4, help="sequences a rank and micro-batch")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--lr", type=script.positive, default=5e-4)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="fp32: without that rung")
    parser.add_argument("--bucket-mib", type=script.positive, help="default: a quarter of the gradients, at most 25")
    parser.add_argument("--accumulation", type=script.at_least(1), default=4, help="micro-batches on the last rung")
    parser.add_argument("--without", type=script.comma_list(str), default=[], help="rungs to leave out")
    parser.add_argument("--starts", type=script.at_least(1), default=4, help="build all rungs anew so many times")
    parser.add_argument("--rounds", type=script.at_least(1), default=5, help="of each start")
    parser.add_argument("--steps", type=script.at_least(1), default=2, help="of each rung in each round")
    parser.add_argument("--one-at-a-time", action="store_true", help="one model in memory; drift is not shared")
    parser.add_argument("--profile", metavar="RUNG", help="keep its trace, and list its operators")
    parser.add_argument("--threads", type=script.at_least(1), help="CPU threads a rank (default: cores / local ranks)")
    args = parser.parse_args(argv)
    gradients_mib = 4 * lm.parameter_count(lm.config(args.preset, args.seq_len)) / 2**20
    args.bucket_mib = args.bucket_mib or min(25, gradients_mib / 4)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    rungs = ladder(
        dtype=args.dtype, bucket_mib=args.bucket_mib, accumulation=args.accumulation,
        ranks=dist.read_launch().world_size, without=args.without,
    )  # fmt: skip
    names = [rung.name for rung in rungs]
    if args.profile and args.profile not in names:
        raise script.UserError(f"no rung {args.profile!r} here; --profile takes one of {', '.join(names)}")
    run = script.start(__file__, args)
    with dist.session(args.device, threads=args.threads) as ctx:
        found = measure(rungs, args, ctx, run)
        result = summary(found, args, ctx)
        if ctx.is_main:
            show(found, result, args.profile)
            draw(found, result, run.path("ladder.png"))
        check_losses(found, result)
        return result


if __name__ == "__main__":
    script.run(main)

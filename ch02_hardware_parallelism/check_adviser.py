"""How far off is the strategy adviser? Its predictions beside published training runs, and beside this machine.

You learn   what a cost model can know: states to the byte, the rest of memory and step times to about a quarter
Laptop      torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/check_adviser.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/check_adviser.py --preset small
Cluster     the same on one node
You see     Llama 3 405B and torchtitan's runs, published against predicted; weights, gradients and optimizer exact; on
            this machine the adviser's own plan for DP over all ranks, for one micro-batch and for two, against the step

This machine is described to the adviser by what was measured on it: a matrix product's rate, the share of it that a
step on one rank reaches (its efficiency: that one step is fitted, not predicted), memory bandwidth, and the line of an
all_reduce. All ranks are one node: a laptop has no second level of fabric. The adviser hides communication behind
backward, so what is measured is this chapter's BucketedDataParallel, a bucket as large as a layer. On CPUs the ranks
send with the cores that they compute with, which the adviser does not know: there it promises more than comes.
"""

from __future__ import annotations

import argparse
import statistics
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ch01_intro import roofline, training
from ch01_intro.collectives import slowest_us
from ch01_intro.memory import state_bytes
from ch02_hardware_parallelism.alpha_beta import fit_all_reduce
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.data_parallel import BucketedDataParallel
from ch02_hardware_parallelism.layout import FP32, Cluster, Job, Layout, Plan, find_shape, plan, rank
from ch02_hardware_parallelism.layout.cluster import GIB
from ch02_hardware_parallelism.layout.search import best, variants
from ch02_hardware_parallelism.overlap import Silent
from common import dist, lm, profiling, script

PUBLISHED = Path(__file__).with_name("published.toml")
FIT_S = 0.3  # seconds for each message size that alpha and beta are fitted to
WARM_UP_STEPS = 2
WIDTH = 48  # of a run's name and layout in the table


@dataclass(frozen=True)
class Check:
    """A published run, the adviser's plan for its layout, and the plan that the adviser would choose."""

    run: dict
    plan: Plan
    winner: Plan

    @property
    def speed(self) -> float | None:
        """Predicted over published tokens/s or MFU; None where none was published for bf16."""
        if "mfu" in self.run:
            return self.plan.mfu / self.run["mfu"]
        return self.plan.tokens_per_s_gpu / self.run["tokens_per_s_gpu"] if "tokens_per_s_gpu" in self.run else None

    @property
    def memory(self) -> float | None:
        """Predicted over published peak memory."""
        return self.plan.memory_bytes / GIB / self.run["memory_gib"] if "memory_gib" in self.run else None


def published() -> list[Check]:
    """Each run of published.toml; what its source leaves open of the layout is filled with the best that fits."""
    checks = []
    for run in tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["run"]:
        stated = run["layout"]
        degrees = Layout(**{key: stated[key] for key in ("dp", "tp", "sp", "pp", "cp", "zero") if key in stated})
        job = Job(find_shape(run["model"]), Cluster.of(run["gpu"], degrees.gpus), run["seq_len"], run["batch"])
        sizes = (stated["micro_batch"],) if "micro_batch" in stated else (1, 2, 4, 8)
        plans = [
            plan(job, layout)
            for layout in variants(job, degrees, sizes)
            if layout.recompute == stated.get("recompute", layout.recompute)
        ]
        chosen = best(plans) or min(plans, key=lambda p: p.memory_bytes)
        checks.append(Check(run, chosen, rank(job).winner))
    return checks


def show_published(checks: list[Check]) -> None:
    print(f"{'':{WIDTH}}  ---------- speed a GPU ----------  ----- GiB a GPU -----  time, of that")
    print(
        f"{'published run, its layout':{WIDTH}}  {'published  predicted':32}   published  predicted   of the adviser's"
    )
    for check in checks:
        run, made = check.run, check.plan
        speed, memory = f"{'-':>9}  {'-':>9}" + " " * 13, f"{'-':>9}  {made.memory_bytes / GIB:9.1f}"
        if "mfu" in run:
            speed = f"{run['mfu']:9.1%}  {made.mfu:9.1%} MFU   {check.speed - 1:+4.0%}  "
        elif "tokens_per_s_gpu" in run:
            speed = f"{run['tokens_per_s_gpu']:9,}  {made.tokens_per_s_gpu:9,.0f} tok/s {check.speed - 1:+4.0%}  "
        if check.memory:
            memory = f"{run['memory_gib']:9.1f}  {made.memory_bytes / GIB:9.1f}"
        ratio = made.step_s / check.winner.step_s
        print(f"{run['name']}\n    {made.layout!s:{WIDTH - 4}}  {speed}{memory}   {ratio:.2f} of {check.winner.layout}")


class Logits(nn.Module):
    """A transformers model as this chapter's strategies call theirs: tokens in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens_bt, use_cache=False).logits


def medians_s(actions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of the slowest rank. One of each in turn, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(WARM_UP_STEPS + repeats):
        for name, action in actions.items():
            times[name] += slowest_us(action, device, 1)
    return {name: statistics.median(took[WARM_UP_STEPS:]) / 1e6 for name, took in times.items()}


def measure(args: argparse.Namespace, ctx: dist.Context) -> dict:
    """What the adviser is told of this machine, and steps to hold its plans against; in float32."""
    shape, ranks, device = find_shape(args.preset), ctx.world_size, ctx.device
    BucketedDataParallel.bucket_bytes = shape.layer_parameters * FP32.gradients
    torch.manual_seed(args.seed)  # all ranks know the whole job's batch
    tokens = torch.randint(shape.vocab_size, (ranks * args.batch_size, args.seq_len + 1), device=device)
    batch = tokens[:, :-1], tokens[:, 1:]

    def build() -> BucketedDataParallel:
        model = Logits(lm.build(lm.config(args.preset, args.seq_len), device, seed=args.seed))
        return BucketedDataParallel(model, Comm(), lambda _: training.make_optimizer(model, 1e-4))

    together, alone = build(), build()
    alone.comm = Silent()  # one rank's step, made by all at once: they share caches and memory

    def step(strategy: BucketedDataParallel, micro_batches: int) -> None:
        strategy.backward([batch] * micro_batches)
        strategy.update()

    actions: dict[str, Callable[[], object]] = {"one_rank": lambda: step(alone, 1)}
    if ranks > 1:
        actions |= {"data_parallel": lambda: step(together, 1)}
    took = medians_s(actions | {"accumulated": lambda: step(together, 2)}, device, args.steps)
    states = state_bytes(together.model, together.optimizer).values()
    memory = profiling.available_memory(device)
    matmul, triad = roofline.matmul_rate(device, torch.float32), roofline.triad_rate(device, ranks)
    flops = profiling.flops_per_token(shape, args.seq_len) * args.batch_size * args.seq_len
    found = {
        "world_size": ranks,
        "state_bytes": sum(row.parameters + row.gradients + row.optimizer for row in states),
        "matmul_flops_per_s": matmul,
        "triad_bytes_per_s": triad,
        "rank_memory_bytes": memory if device.type == "cuda" else memory // ranks,
        "efficiency": flops / matmul / took["one_rank"],
        **{f"step_ms_{name}": seconds * 1e3 for name, seconds in took.items()},
    }
    if ranks > 1:
        line = fit_all_reduce(device, budget_s=FIT_S)
        found |= {"allreduce_alpha_us": line.alpha_s * 1e6, "allreduce_bytes_per_s": line.bytes_per_s}
    return found


def predict(found: dict, args: argparse.Namespace) -> dict:
    """The adviser's plans for the steps that `measure` took, on the machine that it found."""
    shape, ranks = find_shape(args.preset), found["world_size"]

    def planned(gpus: int, micro_batches: int) -> Plan:
        cluster = Cluster.measured(found | {"world_size": gpus})
        job = Job(shape, cluster, args.seq_len, gpus * micro_batches * args.batch_size, FP32)
        return plan(job, Layout(dp=gpus, micro_batch=args.batch_size))

    plans = {"one_rank": planned(1, 1), "data_parallel": planned(ranks, 1), "accumulated": planned(ranks, 2)}
    told = {f"step_ms_{name}_predicted": made.step_s * 1e3 for name, made in plans.items()}
    for name in ("data_parallel", "accumulated"):  # the one rank's step is what the efficiency was fitted to
        if measured_ms := found.get(f"step_ms_{name}"):
            told[f"predicted_over_measured_{name}"] = told[f"step_ms_{name}_predicted"] / measured_ms
    memory = plans["one_rank"].memory
    return told | {"state_bytes_predicted": int(sum(memory[part] for part in ("weights", "gradients", "optimizer")))}


def show_measured(found: dict, preset: str) -> None:
    ranks = found["world_size"]
    title = f"this machine, {preset}, float32, ranks: {ranks}"
    print(f"\n{title:42}       measured      predicted")
    print(f"{'weights, gradients, optimizer':42} {found['state_bytes']:14,} {found['state_bytes_predicted']:14,} bytes")
    fitted = f"fitted: {found['efficiency']:.0%} of a matmul's {found['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s"
    rate, alpha = found.get("allreduce_bytes_per_s", 0) / 1e9, found.get("allreduce_alpha_us", 0)
    line = f"all_reduce: {alpha:.0f} us + bytes / {rate:.2f} GB/s"
    rows = {
        "one_rank": ("one rank's step", fitted),
        "data_parallel": (f"DP {ranks}, overlapped", line),
        "accumulated": (f"DP {ranks}, overlapped, 2 micro-batches" if ranks > 1 else "2 micro-batches", ""),
    }
    for key, (name, how) in rows.items():
        if measured := found.get(f"step_ms_{key}"):
            predicted = found[f"step_ms_{key}_predicted"]
            off = "" if key == "one_rank" else f"{predicted / measured - 1:+.0%}"  # what is fitted predicts nothing
            print(f"{name:42} {measured:11.1f} ms {predicted:11.1f} ms  {off:4}  {how}".rstrip())


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano", choices=tuple(lm.PRESETS))
    parser.add_argument("--batch-size", type=script.at_least(1), default=4, help="sequences a rank")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--steps", type=script.at_least(3), default=10)
    args = parser.parse_args(argv)
    script.start(__file__, args)
    with dist.session(args.device) as ctx:
        found = measure(args, ctx)
    if not ctx.is_main:
        return {}
    found |= predict(found, args)
    checks = published()
    show_published(checks)
    show_measured(found, args.preset)
    speeds = [check.speed for check in checks if check.speed]
    return {
        **found,
        "published_runs": len(checks),
        "published_fit": sum(check.plan.fits for check in checks),
        "speed_ratio_least": min(speeds),
        "speed_ratio_most": max(speeds),
        "states_exact": found["state_bytes"] == found["state_bytes_predicted"],
    }


if __name__ == "__main__":
    script.run(main)

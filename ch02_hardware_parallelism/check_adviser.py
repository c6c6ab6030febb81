"""How far off is the strategy adviser? Its predictions beside published training runs, and beside this machine.

You learn   what a cost model can know: states to the byte, the rest of memory and step times to about a quarter
Laptop      torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/check_adviser.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/check_adviser.py --preset small
Cluster     the same on one node
You see     Llama 3 405B and torchtitan's runs, published against predicted; weights, gradients and optimizer exact; the
            step on one rank from a matrix product's rate (too fast: a step is more than matrix products), and the step
            with data parallelism from the step on one rank plus the measured latency and bandwidth of an all_reduce
"""

from __future__ import annotations

import argparse
import statistics
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ch01_intro import roofline, training
from ch01_intro.memory import state_bytes
from ch01_intro.train_baseline import average_gradients
from ch02_hardware_parallelism.alpha_beta import AlphaBeta, fit
from ch02_hardware_parallelism.layout import FP32, Cluster, Job, Layout, Plan, find_shape, plan, rank
from ch02_hardware_parallelism.layout.cost import GIB, stage_parameters
from ch02_hardware_parallelism.layout.search import best, variants
from common import dist, lm, profiling, script

PUBLISHED = Path(__file__).with_name("published.toml")
SIZES = [2**n for n in (12, 16, 18, 20, 22)]  # bytes of the all_reduces that alpha and beta are fitted to


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
        degrees = Layout(**{key: stated[key] for key in ("dp", "tp", "pp", "cp", "zero") if key in stated})
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
    print(f"{'':38}  ---------- speed a GPU ----------  ----- GiB a GPU -----  time, of that")
    print(f"{'published run, its layout':38}  {'published  predicted':32}   published  predicted   of the adviser's")
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
        print(f"{run['name']}\n    {made.layout!s:34}  {speed}{memory}   {ratio:.2f} of {check.winner.layout}")


def median_step(step: object, device: torch.device, steps: int) -> float:
    """Median seconds of `steps` calls, after two."""
    times = []
    for _ in range(steps + 2):
        roofline.synchronize(device)
        begin = time.perf_counter()
        step()  # type: ignore[operator]
        roofline.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def fit_all_reduce(device: torch.device, repeats: int = 15) -> AlphaBeta:
    """Latency and bandwidth of an all_reduce between the ranks, by the slowest rank's median."""
    seconds = []
    for size in SIZES:
        message = torch.zeros(size // 4, device=device)
        mine = median_step(lambda message=message: torch.distributed.all_reduce(message), device, repeats)
        slowest = torch.tensor([mine], dtype=torch.float64)
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
        seconds.append(float(slowest))
    return fit(SIZES, seconds)


def measure(args: argparse.Namespace, ctx: dist.Context) -> dict:
    """Train a few steps on this machine in float32, with and without averaging gradients, beside the predictions."""
    shape, ranks, device = find_shape(args.preset), ctx.world_size, ctx.device
    model = lm.build(lm.config(args.preset, args.seq_len), device, seed=args.seed)
    optimizer = training.make_optimizer(model, 1e-4)
    generator = torch.Generator().manual_seed(args.seed + ctx.rank)
    tokens = torch.randint(shape.vocab_size, (args.batch_size, args.seq_len + 1), generator=generator).to(device)

    def compute() -> None:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    def step(average: bool) -> None:
        optimizer.zero_grad()
        compute()
        if average:
            average_gradients(model, ranks)
        optimizer.step()

    alone_s = median_step(lambda: step(False), device, args.steps)  # all ranks at once: they share caches and memory
    states = state_bytes(model, optimizer).values()
    counted = sum(row.parameters + row.gradients + row.optimizer for row in states)
    together_s = median_step(lambda: step(True), device, args.steps) if ranks > 1 else None

    matmul, triad = roofline.matmul_rate(device, torch.float32), roofline.triad_rate(device, ranks)
    flops = profiling.flops_per_token(shape, args.seq_len) * args.batch_size * args.seq_len
    found = {
        "world_size": ranks,
        "state_bytes": counted,
        "state_bytes_predicted": int(stage_parameters(shape, shape.num_hidden_layers, True, True)) * state_size(),
        "matmul_flops_per_s": matmul,
        "triad_bytes_per_s": triad,
        "available_bytes": profiling.available_memory(device),
        "step_ms_one_rank": alone_s * 1e3,
        "step_ms_one_rank_predicted": flops / matmul * 1e3,
        "efficiency": min(1.0, flops / matmul / alone_s),
    }
    if together_s is not None:
        link = fit_all_reduce(device)
        message = 4 * shape.parameters
        predicted_s = alone_s + link.time_s(message)
        found |= {
            "allreduce_alpha_us": link.alpha_s * 1e6,
            "allreduce_bytes_per_s": link.bytes_per_s,
            "step_ms_data_parallel": together_s * 1e3,
            "step_ms_data_parallel_predicted": predicted_s * 1e3,
            "predicted_over_measured": predicted_s / together_s,
        }
    return found


def state_size() -> int:
    return FP32.weights + FP32.gradients + FP32.optimizer


def show_measured(found: dict, preset: str) -> None:
    print(f"\nthis machine, {preset}, float32, {found['world_size']} ranks              measured   predicted")
    print(f"weights, gradients, optimizer     {found['state_bytes']:14,} {found['state_bytes_predicted']:14,} bytes")
    rows = [
        ("one rank's step", "step_ms_one_rank", f"from a matmul at {found['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s")
    ]
    if "step_ms_data_parallel" in found:
        rate, alpha = found["allreduce_bytes_per_s"] / 1e9, found["allreduce_alpha_us"]
        said = f"one rank's measured step + all_reduce ({alpha:.0f} us + bytes / {rate:.2f} GB/s)"
        rows.append(("data parallel, not overlapped", "step_ms_data_parallel", said))
    for name, key, how in rows:
        print(f"{name:33} {found[key]:11.1f} ms {found[key + '_predicted']:11.1f} ms   {how}")


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

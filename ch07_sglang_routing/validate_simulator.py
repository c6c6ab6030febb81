"""The routing simulator against the real thing: the same trace on servers of chapter 6's engine and in virtual time.

You learn   what a simulation may be believed for: measure its coefficients, predict, then look; why the measurement has
            to be made under the conditions of the run, and again each time
Laptop      python -m ch07_sglang_routing.validate_simulator      (leave the machine alone meanwhile)
GPU node    python -m ch07_sglang_routing.validate_simulator --preset 1b --rate 20 --device cuda
Cluster     nothing more
You see     the coefficients; then for each round and policy TTFT, E2E, tokens/s and hit rate, simulated / live; the
            medians of the ratios

A round is calibration, the trace live, calibration again: what else the machine does meanwhile changes a step's length,
so it must be in both. Each server computes in one thread. A server whose neighbours compute too is slower; how much is
measured, and how often that is so the simulation says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from ch06_vllm import load
from ch06_vllm.engine.request import Config
from ch06_vllm.servers import Server
from ch06_vllm.started import folder_of
from ch07_sglang_routing.router.policies import POLICIES
from ch07_sglang_routing.simulator import live, run, traces
from ch07_sglang_routing.simulator.run import Played, Setting
from common import lm, logs, script

log = logs.get_logger()
MEASURES = {
    "ttft": lambda one: float(one.ttft_s.mean()),
    "e2e": lambda one: float(one.e2e_s.mean()),
    "tokens_per_s": lambda one: one.output_tokens_per_s,
    "hit_rate": lambda one: one.hit_rate,
}


def policy(text: str) -> str:
    if text not in POLICIES:
        raise argparse.ArgumentTypeError(f"{text!r} is no policy; take some of {', '.join(POLICIES)}")
    return text


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", choices=lm.PRESETS, default="nano")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    parser.add_argument("--workers", type=script.at_least(1), default=2)
    parser.add_argument("--policies", type=script.comma_list(policy), default="round_robin,joint")
    parser.add_argument("--requests", type=script.at_least(20), default=120)
    parser.add_argument("--rate", type=script.positive, default=8.0, help="requests/s")
    parser.add_argument("--rounds", type=script.at_least(1), default=3)
    parser.add_argument("--blocks", type=script.at_least(64), default=256, help="of 16 tokens, a server")
    parser.add_argument("--tolerance", type=script.positive, default=0.15, help="allowed |simulated / live - 1|")
    return parser.parse_args(argv)


def predicted(trace: traces.Trace, name: str, setting: Setting, alone: live.Samples, together: live.Samples) -> Played:
    """Played in virtual time, with each server as slow as its neighbours' share of busy time makes it."""
    one, all_ = live.fit(alone), live.fit(together)
    busy = 0.5
    for _ in range(4):
        slowed = dataclasses.replace(setting, physics=live.blend(one, all_, busy))
        played = run.play(trace, run.policy(name, slowed), slowed)
        busy = statistics.fmean(played.busy) if setting.workers > 1 else 0.0
    return played


async def rounds(servers: list[Server], ids: np.ndarray, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(args.seed)
    samples: tuple[live.Samples, live.Samples] = {}, {}

    async def calibrate() -> None:
        for found, which in zip(samples, (servers[:1], servers), strict=True):
            await live.measure(which, ids, found, rng)

    await calibrate()  # warms up
    ratios: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    for number in range(args.rounds):
        trace = traces.sessions(
            args.requests, args.rate, np.random.default_rng((args.seed, number)), systems=8, system_tokens=192,
            turns=2.0, think_s=2.0, longest=900, new_tokens="lognormal:40,0.6", output_tokens="lognormal:32,0.5",
        )  # fmt: skip
        for name in args.policies if number % 2 else reversed(args.policies):
            samples = {}, {}
            await calibrate()
            await calibrate()
            seen = await live.play(trace, run.policy(name, setting), servers, ids)
            await calibrate()
            await calibrate()
            said = predicted(trace, name, setting, *samples)
            for measure, of in MEASURES.items():
                ratios.setdefault(f"{name}_{measure}", []).append(of(said) / of(seen))
            show = "  ".join(f"{m} {of(said):.4g} / {of(seen):.4g}" for m, of in MEASURES.items())
            print(f"round {number + 1}, {name}: simulated / live: {show}  (busy {np.mean(said.busy):.0%})", flush=True)
    for key, values in ratios.items():
        found[f"{key}_ratio"], found[f"{key}_range"] = statistics.median(values), [min(values), max(values)]
    print(f"alone:    {live.fit(samples[0])}\ntogether: {live.fit(samples[1])}")
    found["worst"] = max(abs(value - 1) for key, value in found.items() if key.endswith("_ratio"))
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    model = args.model or folder_of(args.preset)
    script.start(__file__, args)
    config = Config("", num_blocks=args.blocks, max_num_seqs=16, max_num_batched_tokens=256)
    names = ("num_blocks", "max_num_seqs", "max_num_batched_tokens")
    options = {name: getattr(config, name) for name in names} | {"max_model_len": 1024, "device": args.device}
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(Server(model, "ours", options, env={"OMP_NUM_THREADS": "1"}))
            for _ in range(args.workers)
        ]
        log.info("started", servers=len(servers))
        setting = Setting(workers=args.workers, config=config)
        result = asyncio.run(rounds(servers, load.usable_ids(Path(model)), setting, args))
    if result["worst"] > args.tolerance:
        off = f"simulated and live differ by {result['worst']:.0%}, more than {args.tolerance:.0%}"
        raise script.CheckFailed(f"{off}; if the ranges are wide, the machine is busy: take more --rounds", result)
    return result


if __name__ == "__main__":
    script.run(main)

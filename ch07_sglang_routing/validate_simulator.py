"""The routing simulator against the real thing: the same trace on chapter 6's engines and in virtual time.

You learn   what a simulation may be believed for: measure its coefficients, predict, then look; why the measurement has
            to be made under the conditions of the run, and again each time
Laptop      python -m ch07_sglang_routing.validate_simulator
            python -m ch07_sglang_routing.validate_simulator --clock wall --rate 5   (leave the machine alone then)
GPU node    python -m ch07_sglang_routing.validate_simulator --preset 1b --rate 20 --clock wall
Cluster     nothing more
You see     the coefficients; then for each round and policy TTFT, E2E, tokens/s and hit rate, simulated / live; the
            medians of the ratios

A round is calibration, the trace, calibration again. By --clock cpu the real engines are stepped by hand in this
process, and a step takes the CPU seconds spent on it: what else the machine does hardly counts. By --clock wall they
are servers, asked through HTTP: all that happens counts, and engines slow each other on the cores that they share; how
much is measured, and how often that is so the simulation says. Each engine computes in one thread.
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
import torch

from ch06_vllm import load
from ch06_vllm.engine.engine import Engine
from ch06_vllm.engine.request import Config
from ch06_vllm.servers import Server
from ch06_vllm.started import folder_of
from ch07_sglang_routing.router.policies import named
from ch07_sglang_routing.simulator import by_hand, live, run, traces
from ch07_sglang_routing.simulator.run import Played, Setting
from common import lm, script

MEASURES = {
    "ttft": lambda one: float(one.ttft_s.mean()),
    "e2e": lambda one: float(one.e2e_s.mean()),
    "tokens_per_s": lambda one: one.output_tokens_per_s,
    "hit_rate": lambda one: one.hit_rate,
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", choices=lm.PRESETS, default="nano")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    parser.add_argument("--workers", type=script.at_least(1), default=2)
    parser.add_argument("--policies", type=script.comma_list(named), default="round_robin,joint")
    parser.add_argument("--requests", type=script.at_least(20), default=120)
    parser.add_argument("--rate", type=script.positive, default=12.0, help="requests/s")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="stepped by hand, or servers")
    parser.add_argument("--rounds", type=script.at_least(1), default=3)
    parser.add_argument("--blocks", type=script.at_least(256), default=256, help="of 16 tokens, a server")
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


def rounds(
    real: list[Server] | list[Engine], ids: np.ndarray, setting: Setting, args: argparse.Namespace
) -> dict[str, Any]:
    rng = np.random.default_rng(args.seed)
    samples: tuple[live.Samples, live.Samples] = {}, {}

    def calibrate(times: int = 2) -> None:
        for _ in range(times):
            if args.clock == "cpu":
                by_hand.measure(real[0], ids, samples[0], rng)
            else:
                for found, which in zip(samples, (real[:1], real), strict=True):
                    asyncio.run(live.measure(which, ids, found, rng))

    calibrate(1)  # warms up
    ratios: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    for number in range(args.rounds):
        trace = traces.sessions(
            args.requests, args.rate, np.random.default_rng((args.seed, number)), systems=8, system_tokens=192,
            turns=2.0, think_s=2.0, longest=900, new_tokens="lognormal:40,0.6", output_tokens="lognormal:32,0.5",
        )  # fmt: skip
        for turn, name in enumerate(args.policies if number % 2 else reversed(args.policies)):
            samples = {}, {}
            calibrate()
            chosen = run.policy(name, setting)
            if args.clock == "cpu":
                seen = by_hand.play(trace, chosen, real, ids)
            else:
                seen = asyncio.run(live.play(trace, chosen, real, ids, salt=1 + number * len(args.policies) + turn))
            calibrate()
            said = predicted(trace, name, setting, samples[0], samples[1] or samples[0])
            for measure, of in MEASURES.items():
                ratios.setdefault(f"{name}_{measure}", []).append(of(said) / of(seen))
            show = "  ".join(f"{m} {of(said):.4g} / {of(seen):.4g}" for m, of in MEASURES.items())
            print(f"round {number + 1}, {name}: simulated / live: {show}  (busy {np.mean(said.busy):.0%})", flush=True)
    for key, values in ratios.items():
        found[f"{key}_ratio"], found[f"{key}_range"] = statistics.median(values), [min(values), max(values)]
    terms = dataclasses.asdict(live.fit(samples[0]))
    print("the last round's, us:", "  ".join(f"{name.removesuffix('_s')} {1e6 * us:.2g}" for name, us in terms.items()))
    found["worst"] = max(abs(value - 1) for key, value in found.items() if key.endswith("_ratio"))
    print(f"simulated / live, the median that is farthest from 1: {found['worst']:.1%} off")
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    model = args.model or folder_of(args.preset)
    script.start(__file__, args)
    config = Config("", num_blocks=args.blocks, max_num_seqs=16, max_num_batched_tokens=256)
    names = ("num_blocks", "max_num_seqs", "max_num_batched_tokens")
    options = {name: getattr(config, name) for name in names} | {"max_model_len": 1024, "device": args.device}
    setting, ids = Setting(workers=args.workers, config=config, recur=False), load.usable_ids(Path(model))
    if args.clock == "cpu":
        engines = [Engine(Config(str(model), **options | {"device": "cpu"})) for _ in range(args.workers)]
        torch.set_num_threads(1)
        result = rounds(engines, ids, setting, args)
    else:
        with contextlib.ExitStack() as stack:
            started = [Server(model, "ours", options, env={"OMP_NUM_THREADS": "1"}) for _ in range(args.workers)]
            servers = [stack.enter_context(server) for server in started]
            result = rounds(servers, ids, setting, args)
    if result["worst"] > args.tolerance:
        off = f"simulated and live differ by {result['worst']:.0%}, more than {args.tolerance:.0%}"
        raise script.CheckFailed(f"{off}; if the ranges are wide, the machine is busy: take more --rounds", result)
    return result


if __name__ == "__main__":
    script.run(main)

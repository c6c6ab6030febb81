"""The two phases of a request: the prompt is computed at once (prefill), then one token a step (decode).

You learn   FLOPs and bytes of both by formula; why prefill is bound by arithmetic and decode by memory, what batching
            changes for each, and from which context on a batch no longer helps; what share of a request's time each is
Laptop      python -m ch06_vllm.phases --preset small
            python -m ch06_vllm.phases --engine ours,vllm          (vLLM too: one start)
GPU node    python -m ch06_vllm.phases --preset 1b --prompts 128,512,2048 --batches 1,8,64 --engine ours,vllm
Cluster     nothing more: a replica is one device, or one tensor-parallel group
You see     a table: FLOPs a byte against this machine's ridge, milliseconds of each engine, what binds; phases.png: the
            roofline, tokens/s over prompt lengths and batch sizes

Both engines are stepped by hand, without a server, and each step is timed by itself. The ceilings are measured here, at
the start: a matrix product and a triad.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ch01_intro import roofline
from ch01_intro.roofline import Ceilings, Work
from ch06_vllm import load, turns
from ch06_vllm.engine import Config, SamplingParams
from ch06_vllm.engine.engine import Engine
from ch06_vllm.kv_policies import blocks
from ch06_vllm.kv_run import stepped, vllm_in_steps
from ch06_vllm.started import engine_name, folder_of
from common import dist, lm, logs, script

log = logs.get_logger()
BLOCK = 32  # vLLM's CPU kernels are made for multiples of it


@dataclass(frozen=True)
class Shape:
    """prefill: `batch` prompts of `tokens` in one step. decode: `batch` requests with `tokens` in the cache."""

    phase: str
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.phase}, {self.batch} x {self.tokens}"

    @property
    def computed(self) -> int:
        """Tokens of one step."""
        return self.batch * (self.tokens if self.phase == "prefill" else 1)

    def work(self, config: Any, seconds: float) -> Work:
        """FLOPs and the least bytes of one step, by formula (ch01_intro/roofline.py)."""
        new, cached = (self.tokens, 0) if self.phase == "prefill" else (1, self.tokens)
        flops = roofline.inference_flops(config, self.batch, new, cached)
        moved = roofline.inference_bytes(config, self.batch, new, cached, config.dtype.itemsize)
        return Work(self.name, seconds, flops, moved)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--engine", type=script.comma_list(engine_name), default="ours", help="ours, vllm or both")
    parser.add_argument("--preset", choices=lm.PRESETS, default="nano", help="a model folder is made of it, once")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    sizes = script.comma_list(script.at_least(1))
    parser.add_argument("--prompts", type=sizes, default="32,128,512", help="prompt lengths; and tokens in the cache")
    parser.add_argument("--batches", type=sizes, default="1,8,32")
    parser.add_argument("--steps", type=script.at_least(3), default=16, help="decode steps timed")
    parser.add_argument("--rounds", type=script.at_least(1), default=3, help="of everything, interleaved")
    return parser.parse_args(argv)


def shapes(prompts: Iterable[int], batches: Iterable[int]) -> list[Shape]:
    """Prefill of one prompt of each length, and of several of the shortest; decode of each batch and context."""
    prompts, batches = sorted(set(prompts)), sorted(set(batches))
    alone = [Shape("prefill", 1, tokens) for tokens in prompts]
    several = [Shape("prefill", batch, prompts[0]) for batch in batches if batch > 1]
    return [*alone, *several, *(Shape("decode", *pair) for pair in itertools.product(batches, prompts))]


Times = dict[Shape, list[float]]


def on_ours(engine: Engine, shape: Shape, requests: Sequence[load.Request], times: Times) -> None:
    """Each step by itself: the first computes the prompts, each later one a token of all."""
    for request in requests:
        engine.add(request.prompt, SamplingParams.exactly(request.max_tokens))
    seconds = []
    while engine.has_work:
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    times[shape] += seconds[:1] if shape.phase == "prefill" else seconds[1:]


def on_vllm(engine: turns.Process, shape: Shape, requests: Sequence[load.Request], times: Times) -> None:
    """The same, told by vllm_steps.py."""
    steps = stepped(engine, requests)["steps"]
    seconds = np.diff([0.0, *(step["at_s"] for step in steps)]).tolist()
    times[shape] += seconds[:1] if shape.phase == "prefill" else seconds[1:]


def measure(args: argparse.Namespace, engine: str, model: Path, wanted: Sequence[Shape]) -> dict[Shape, float]:
    """Median seconds of a step of each shape."""
    ids = load.usable_ids(model)
    longest, most = max(args.prompts) + args.steps + 2, max(args.batches)
    budget = max(shape.batch * shape.tokens for shape in wanted)
    options: dict[str, Any] = {
        "max_model_len": longest, "max_num_seqs": most, "max_num_batched_tokens": max(budget, longest),
        "enable_prefix_caching": False, "block_size": BLOCK,
    }  # fmt: skip
    times: Times = {shape: [] for shape in wanted}

    def rounds(once: Callable[[Shape, Sequence[load.Request], Times], None]) -> None:
        for number in range(args.rounds + 1):
            for shape in wanted:
                outputs = [1 if shape.phase == "prefill" else args.steps + 1] * shape.batch
                rng = np.random.default_rng((args.seed, number, shape.batch, shape.tokens))
                requests = load.workload(ids, [shape.tokens] * shape.batch, outputs, rng)
                once(shape, requests, times if number else {shape: []})  # the first round warms up

    log.info("measuring", engine=engine, shapes=len(wanted))
    if engine == "ours":
        room = {"num_blocks": most * blocks(longest, BLOCK), "device": args.device}
        own = Engine(Config(str(model), **options, **room))
        rounds(lambda shape, requests, into: on_ours(own, shape, requests, into))
    else:
        config = lm.config(str(model))
        cache = roofline.kv_bytes(config, 1, (most + 1) * blocks(longest, BLOCK) * BLOCK, config.dtype.itemsize)
        with vllm_in_steps(model, options | {"kv_cache_memory_bytes": cache}) as theirs:
            rounds(lambda shape, requests, into: on_vllm(theirs, shape, requests, into))
    return {shape: statistics.median(seconds) for shape, seconds in times.items()}


def table(config: Any, measured: dict[str, dict[Shape, float]], ceilings: Ceilings) -> str:
    heads = ("FLOPs/byte", "GFLOP", "MiB", *(f"{name} ms" for name in measured), "tokens/s")
    lines = [f"{'step':<22}" + "".join(f"{head:>12}" for head in heads) + "   binds (by the first engine)"]
    first = next(iter(measured.values()))
    for shape, seconds in first.items():
        work = shape.work(config, seconds)
        cells = [
            work.intensity,
            work.flops / 1e9,
            work.moved / 2**20,
            *(times[shape] * 1e3 for times in measured.values()),
        ]
        line = f"{shape.name:<22}" + "".join(f"{cell:>12,.2f}" for cell in [*cells, shape.computed / seconds])
        lines.append(f"{line}   {roofline.classify(work, ceilings)[0].partition(' (')[0]}")
    rates = f"{ceilings.flops / 1e12:.3g} TFLOP/s, {ceilings.memory / 2**30:.3g} GiB/s"
    return "\n".join([*lines, f"this machine: {rates}; ridge {ceilings.ridge:.1f} FLOPs a byte"])


def plot(config: Any, measured: dict[str, dict[Shape, float]], ceilings: Ceilings, path: Path) -> None:
    """The roofline of the extremes; tokens/s of prefill over prompt lengths, and of decode over batch sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (roof, prefill, decode) = pyplot.subplots(1, 3, figsize=(16, 5.2), layout="constrained")
    first = next(iter(measured.values()))
    alone = [shape for shape in first if shape.phase == "prefill" and shape.batch == 1]
    steps = [shape for shape in first if shape.phase == "decode"]
    shown = dict.fromkeys([alone[0], alone[-1], steps[0], steps[-1]])
    roofline.draw(roof, [shape.work(config, first[shape]) for shape in shown], ceilings)
    roof.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for (name, times), line in zip(measured.items(), ("-", "--"), strict=False):
        rate = {shape: shape.computed / seconds for shape, seconds in times.items()}
        prefill.plot([s.tokens for s in alone], [rate[s] for s in alone], f"o{line}", color="black", label=name)
        for tokens, color in zip(sorted({s.tokens for s in steps}), roofline.COLORS, strict=False):
            own = [shape for shape in steps if shape.tokens == tokens]
            decode.plot(
                [s.batch for s in own],
                [rate[s] for s in own],
                f"o{line}",
                color=color,
                label=f"{name}, {tokens} cached",
            )
    prefill.set(xlabel="prompt tokens", ylabel="tokens/s", xscale="log", yscale="log", title="prefill of one prompt")
    decode.set(xlabel="requests in the batch", xscale="log", yscale="log", title="decode")
    for axis, values in ((prefill, [s.tokens for s in alone]), (decode, sorted({s.batch for s in steps}))):
        axis.set_xticks(values, map(str, values))
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
        axis.grid(which="major", color="#eeeeee")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def figures(name: str, times: dict[Shape, float]) -> dict[str, Any]:
    """RESULT's keys of one engine."""
    alone = [shape for shape in times if shape.phase == "prefill" and shape.batch == 1]
    steps = [shape for shape in times if shape.phase == "decode"]
    one, many = steps[0], max(steps, key=lambda shape: (shape.batch, -shape.tokens))
    long = alone[-1]
    same = next(shape for shape in steps if shape.batch == 1 and shape.tokens == long.tokens)
    found = {
        "prefill_ms": times[long] * 1e3, "decode_ms": times[one] * 1e3, "decode_batch_ms": times[many] * 1e3,
        "prefill_tokens_per_s": long.computed / times[long], "decode_tokens_per_s": one.computed / times[one],
        "decode_batch_tokens_per_s": many.computed / times[many],
        "batch_step_times": times[many] / times[one],  # how much longer a step of all takes than that of one
        "decode_tokens_in_a_prefill": times[long] / times[same],  # tokens that one request could decode meanwhile
    }  # fmt: skip
    return {f"{name}_{key}": value for key, value in found.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    run = script.start(__file__, args)
    model = args.model or folder_of(args.preset)
    config = lm.config(str(model))
    device = dist.pick_device(args.device, dist.read_launch())
    ceilings = Ceilings(roofline.matmul_rate(device, config.dtype), roofline.triad_rate(device))
    wanted = shapes(args.prompts, args.batches)
    measured = {engine: measure(args, engine, model, wanted) for engine in args.engine}
    print(table(config, measured, ceilings))
    plot(config, measured, ceilings, run.path("phases.png"))
    works = {shape: shape.work(config, seconds) for shape, seconds in next(iter(measured.values())).items()}
    prefill = max((w for w in works if w.phase == "prefill" and w.batch == 1), key=lambda shape: shape.tokens)
    decode = min((w for w in works if w.phase == "decode"), key=lambda shape: (shape.batch, shape.tokens))
    result: dict[str, Any] = {
        "preset": args.preset, "ridge_flops_per_byte": ceilings.ridge, "matmul_tflop_per_s": ceilings.flops / 1e12,
        "mem_gib_per_s": ceilings.memory / 2**30, "intensity_prefill": works[prefill].intensity,
        "intensity_decode": works[decode].intensity,
        "binds_prefill": roofline.classify(works[prefill], ceilings)[0],
        "binds_decode": roofline.classify(works[decode], ceilings)[0],
    }  # fmt: skip
    for name, times in measured.items():
        result |= figures(name, times)
    return result | {"steps": [
        {"phase": s.phase, "batch": s.batch, "tokens": s.tokens, "flops": works[s].flops, "bytes": works[s].moved,
         **{f"{name}_ms": times[s] * 1e3 for name, times in measured.items()}} for s in works
    ]}  # fmt: skip


if __name__ == "__main__":
    script.run(main)

"""Training, offline inference and serving on the same model: what each asks of the machine, side by side.

You learn   why training and prefill multiply matrices by many tokens at once (tens to hundreds of FLOPs a byte)
            and are compute bound, while decode reads every weight to make one token a sequence (one FLOP a byte in 16
            bits) and is bound by memory bandwidth; why batching decode costs little time; what a KV cache saves and
            holds; how long requests that queue wait
Laptop      python ch01_intro/workloads.py
            python ch01_intro/workloads.py --model runs/nano/model      (what train_baseline.py --out runs/nano saved)
            python ch01_intro/workloads.py --preset small --dtype fp32 --batch-size 2 --seq-len 64 --new-tokens 12 \\
                --requests 4                                            (4 GiB; decode comes near the memory's limit)
GPU node    python ch01_intro/workloads.py --preset 1b --batch-size 8 --seq-len 1024 --requests 64
Cluster     srun --ntasks=1 --gpus=1 python ch01_intro/workloads.py --preset 1b
You see     one table (intensity, memory, latency, throughput) and workloads.png with the roofline; a proof that decode
            with the KV cache gives the uncached tokens; time to first token at two arrival rates

Prompts are random tokens: the speed does not depend on what they say. With a few million parameters the Python around a
decode step and the launches of its kernels take longer than its bytes: then the verdict says overhead bound. Read the
intensities, and take a larger preset to see the memory's limit itself.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ch01_intro import memory, roofline, training
from ch01_intro.decode import Generated, generate, generate_uncached
from ch01_intro.memory import MIB
from ch01_intro.roofline import Work
from ch01_intro.train_baseline import training_steps
from common import dist, lm, logs, profiling, script

log = logs.get_logger()
WARM_UP_STEPS = 2
LOADS = {"light": 0.2, "busy": 3.0}  # requests that arrive while one is served; above 1 the queue only grows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = training.training_parser(__doc__)
    parser.set_defaults(steps=8, warmup=0)
    group = parser.add_argument_group("workloads")
    group.add_argument("--model", type=Path, help="a Hugging Face folder instead of --preset")
    group.add_argument("--new-tokens", type=script.at_least(2), default=32, help="tokens to generate a sequence")
    group.add_argument("--decode-batch", type=script.at_least(2), default=16, help="sequences decoded together")
    group.add_argument("--requests", type=script.at_least(4), default=12, help="requests at each arrival rate")
    args = parser.parse_args(argv)
    if args.model:
        if not (args.model / "config.json").is_file():
            raise script.UserError(f"no model in {args.model} (config.json is missing); check --model")
        args.preset = str(args.model)
    if args.steps <= WARM_UP_STEPS:
        raise script.UserError(f"--steps {args.steps} leaves none to time after {WARM_UP_STEPS} to warm up; take more")
    longest = lm.config(args.preset, args.seq_len + args.new_tokens).max_position_embeddings
    if args.seq_len + args.new_tokens > longest:
        raise script.UserError(
            f"{args.seq_len} prompt and {args.new_tokens} new tokens exceed the model's {longest} positions; take fewer"
        )
    return args


def serve(
    handle: Callable[[torch.Tensor], Generated], prompts: list[torch.Tensor], gaps_s: np.ndarray
) -> tuple[list[float], list[float], float]:
    """Requests arrive over time, one worker (this thread) takes them from a queue in order: the smallest server.

    Requests are not batched: one that arrives while another is decoded waits until that is finished. Chapter 6 builds
    the engine that lets it join the running batch instead.

    Returns:
        seconds to the first token of each request, from its arrival on; seconds of each later token; tokens/s overall.
    """
    waiting: queue.SimpleQueue[tuple[float, torch.Tensor]] = queue.SimpleQueue()
    begin = time.perf_counter()

    def clients() -> None:
        # They do not wait for answers (an open loop): a slow server does not slow the arrivals down.
        for prompt, arrival in zip(prompts, begin + np.cumsum(gaps_s), strict=True):
            time.sleep(max(0.0, arrival - time.perf_counter()))
            waiting.put((arrival, prompt))

    threading.Thread(target=clients, daemon=True).start()
    done = []
    for _ in prompts:
        arrived, prompt = waiting.get()
        done.append((arrived, handle(prompt)))
    seconds = max(answer.times[-1] for _, answer in done) - begin
    produced = sum(answer.tokens.numel() for _, answer in done)
    first = [answer.times[0] - arrived for arrived, answer in done]
    return first, [s for _, answer in done for s in answer.decode_s], produced / seconds


def random_batches(args: argparse.Namespace, vocab: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        rows = torch.randint(vocab, (args.batch_size, args.seq_len + 1), generator=generator)
        yield rows[:, :-1], rows[:, 1:]


def main(argv: list[str] | None = None) -> dict[str, object]:
    args = parse_args(argv)
    run = script.start(__file__, args)
    with dist.session(args.device, threads=args.threads) as ctx:
        if ctx.world_size > 1:
            raise script.UserError("this exercise compares workloads on one device; start it with python, not torchrun")
        dtype = training.compute_dtype(args.dtype, ctx.device)
        model = training.build_model(args, ctx.device)
        config, vocab = model.config, model.config.vocab_size
        ceilings = roofline.measure_ceilings(ctx, dtype)
        batch, many, length, new = args.batch_size, args.decode_batch, args.seq_len, args.new_tokens
        prompts = torch.randint(vocab, (max(batch, many), length), device=ctx.device)

        log.info("checking the KV cache", preset=args.preset)
        model.eval()  # in float32, where two orders of summation do not change which token is the likeliest
        exact = torch.equal(generate(model, prompts[:2], new).tokens, generate_uncached(model, prompts[:2], new))
        model.train()

        log.info("training", steps=args.steps)
        optimizer, timer = training.make_optimizer(model, args.lr), profiling.StepTimer(ctx.device)
        for _ in training_steps(model, optimizer, random_batches(args, vocab), args, ctx, timer):
            roofline.synchronize(ctx.device)  # so that each step's time is its own
        step_s = timer.median_ms(WARM_UP_STEPS)["step"] / 1e3
        state = sum(row.optimizer for row in memory.state_bytes(model, optimizer).values())
        activations = sum(memory.activation_formula(config, batch, length, dtype).values())
        gradients = sum(p.nbytes for p in model.parameters())
        optimizer.zero_grad()
        del optimizer

        log.info("offline inference", new_tokens=new, decode_batch=many)
        model.eval()
        for parameter in model.parameters():  # inference needs no float32 weights; RoPE's frequencies do stay float32
            parameter.data = parameter.data.to(dtype)
        weights, size = sum(p.nbytes for p in model.parameters()), dtype.itemsize
        generate(model, prompts, 2)
        alone, together = (generate(model, prompts[:n], new) for n in (1, many))
        prefill = generate(model, prompts[:batch], 2)

        log.info("serving", requests=args.requests)
        service_s = min(g.times[-1] - g.begun for g in (generate(model, prompts[:1], new) for _ in range(3)))
        requests = [torch.randint(vocab, (1, length), device=ctx.device) for _ in range(args.requests)]
        served = {}
        for name, load in LOADS.items():  # the same gaps, only shorter: Poisson arrivals
            gaps = np.random.default_rng(args.seed).exponential(service_s / load, args.requests)
            served[name] = serve(lambda prompt: generate(model, prompt, new), requests, gaps)

        # What each did: FLOPs and the least bytes, by formula.
        step_flops = roofline.training_flops(config, batch, length)
        step_bytes = roofline.training_bytes(config, batch, length, dtype)
        context = length + new // 2  # a decode step's mean

        def work(name: str, seconds: float, *shape: int) -> Work:  # shape: sequences, new tokens of each, cached ones
            flops = roofline.inference_flops(config, *shape)
            return Work(name, seconds, flops, roofline.inference_bytes(config, *shape, size))

        works = {
            "training": Work("training step", step_s, sum(step_flops.values()), sum(step_bytes.values())),
            "prefill": work(f"prefill, batch {batch}", prefill.prefill_s, batch, length, 0),
            "decode": work("decode, batch 1", statistics.median(alone.decode_s), 1, 1, context),
            "decode_batch": work(f"decode, batch {many}", statistics.median(together.decode_s), many, 1, context),
        }
        tokens = {"training": batch * length, "prefill": batch * length, "decode": 1, "decode_batch": many}
        rate = {name: tokens[name] / w.seconds for name, w in works.items()}
        held = {
            "training": [gradients, gradients + state, activations, 0]
        }  # bytes, in the order of HELD; weights first
        for name, n, cached in (
            ("prefill", batch, length),
            ("decode", 1, length + new),
            ("decode_batch", many, length + new),
        ):
            held[name] = [weights, 0, 0, roofline.kv_bytes(config, n, cached, size)]
        verdicts = {name: roofline.classify(w, ceilings) for name, w in works.items()}
        used = profiling.memory(ctx.device)
        print(table(works, rate, held))
        for name, (verdict, evidence) in verdicts.items():
            print(f"{works[name].name:<18}{verdict}: {evidence}")
        longer = works["decode_batch"].seconds / works["decode"].seconds
        print(f"\na decode step of {many} sequences takes {longer:.1f} times as long as that of one")
        print(serving_text(served, service_s))
        what = f"{args.preset if not args.model else args.model.name}, {str(dtype)[6:]}, {ctx.device.type}"
        plot(works, rate, held, served, ceilings, run.path("workloads.png"), what)

    result: dict[str, object] = {"preset": args.preset, "dtype": str(dtype)[6:], "kv_cache_exact": exact}
    for name, w in works.items():
        result |= {f"{name}_tokens_per_s": rate[name], f"{name}_ms": w.seconds * 1e3, f"intensity_{name}": w.intensity}
    for name, (first, later, per_s) in served.items():
        p50, p95 = np.percentile(later, [50, 95]) * 1e3
        result |= {f"ttft_ms_p50_{name}": statistics.median(first) * 1e3, f"serving_{name}_tokens_per_s": per_s}
        result |= {f"token_ms_p50_{name}": p50, f"token_ms_p95_{name}": p95}
    return result | {
        "weights_mib": weights / MIB,
        "training_mib": sum(held["training"]) / MIB,
        "kv_cache_mib_per_sequence": held["decode"][3] / MIB,
        "ridge_flops_per_byte": ceilings.ridge,
        "matmul_tflop_per_s": ceilings.flops / 1e12,
        "mem_gib_per_s": ceilings.memory / 2**30,
        "verdicts": {name: verdict for name, (verdict, _) in verdicts.items()},
        "peak_mem_gib": used.peak_gib,
        "memory_source": used.source,
    }


HELD = ("weights", "gradients, Adam", "activations", "KV cache")


def table(works: dict[str, Work], rate: dict[str, float], held: dict[str, list[int]]) -> str:
    names = ("workload", "FLOPs/byte", "GFLOP", "MiB moved", "ms", "tokens/s", *(f"{n} MiB" for n in HELD))
    lines = [f"{names[0]:<18}" + "".join(f"{n:>{max(11, len(n) + 2)}}" for n in names[1:])]
    for name, w in works.items():
        cells = [w.intensity, w.flops / 1e9, w.moved / MIB, w.seconds * 1e3, rate[name], *(b / MIB for b in held[name])]
        columns = zip(names[1:], cells, strict=True)
        lines.append(f"{w.name:<18}" + "".join(f"{cell:>{max(11, len(n) + 2)},.2f}" for n, cell in columns))
    lines.append("FLOPs and bytes by formula (the least that must move); ms and tokens/s measured; memory by formula\n")
    return "\n".join(lines)


def serving_text(served: dict[str, Any], service_s: float) -> str:
    columns = "".join(f"{name:>13}" for name in ("TTFT p50", "TTFT p95", "token p50", "token p95"))
    lines = [f"\nserving one request takes {service_s * 1e3:.1f} ms; requests arrive at random, one worker, in order"]
    lines.append(f"{'load':<7}{'requests/s':>11}{columns}{'tokens/s':>10}")
    for name, (first, later, per_s) in served.items():
        times = [*np.percentile(first, [50, 95]), *np.percentile(later, [50, 95])]
        cells = "".join(f"{t * 1e3:>10.1f} ms" for t in times)
        lines.append(f"{name:<7}{LOADS[name] / service_s:>11.2f}{cells}{per_s:>10.1f}")
    return "\n".join(lines)


def plot(
    works: dict[str, Work], rate: dict[str, float], held: dict[str, list[int]], served: dict[str, Any],
    ceilings: roofline.Ceilings, path: Path, what: str,
) -> None:  # fmt: skip
    """Four panels: roofline, memory, throughput, time to first token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((left, right), (below, last)) = pyplot.subplots(2, 2, figsize=(12, 9.5), layout="constrained")
    figure.suptitle(f"One model, three workloads: {what}", fontsize=11)
    roofline.draw(left, list(works.values()), ceilings)
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    labels = [w.name.replace(", ", "\n").replace(" step", "\nstep") for w in works.values()]
    floor = np.zeros(len(held))
    for name, column, color in zip(HELD, zip(*held.values(), strict=True), roofline.COLORS, strict=False):
        mib = np.array(column) / MIB
        right.bar(labels, mib, bottom=floor, color=color, label=name)
        floor += mib
    right.set(ylabel="MiB", title="memory that must be held")
    right.legend(frameon=False, fontsize=8)
    bars = below.bar(labels, list(rate.values()), color=roofline.COLORS[0])
    below.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    below.set(yscale="log", ylabel="tokens/s", title="throughput")
    for (name, (first, _, _)), color in zip(served.items(), roofline.COLORS, strict=False):
        share = np.arange(1, len(first) + 1) / len(first)
        last.step(np.sort(first) * 1e3, share, where="post", color=color, label=f"{name}: load {LOADS[name]:g}")
    last.set(xlabel="time to first token (ms)", ylabel="share of requests", ylim=(0, 1.02))
    last.set_title("serving: requests that queue wait")
    last.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (right, below, last):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    script.run(main)

"""What the baseline's loop costs: its throughput beside a bare hand-written loop, interleaved, on the same model.

You learn   how to compare two loops on a noisy machine: alternate them in one process, and take medians of pairs
Laptop      python ch01_intro/bench_baseline_loop.py
GPU node    python ch01_intro/bench_baseline_loop.py --preset small --batch-size 16 --seq-len 1024
Cluster     torchrun --standalone --nproc-per-node=2 ch01_intro/bench_baseline_loop.py --device cpu   (data loading)
You see     a ratio near 1: timers, schedule, logging of every loss and the data stream are almost free. `data_share` is
            the part of a step spent waiting for data.
"""

from __future__ import annotations

import random
import statistics
import time

import torch
import torch.nn.functional as F

from ch01_intro import train_baseline, training
from common import data, dist, profiling, script


def main(argv: list[str] | None = None) -> dict:
    parser = training.training_parser(__doc__)
    parser.add_argument("--rounds", type=script.at_least(3), default=15, help="pairs of timings")
    parser.add_argument("--steps-a-round", type=script.at_least(1), default=5)
    args = parser.parse_args(argv)
    run = script.start(__file__, args)
    corpus = training.load_corpus(args)
    args.steps = (args.rounds + 1) * args.steps_a_round
    with dist.session(args.device, threads=args.threads) as ctx:
        dtype = training.compute_dtype(args.dtype, ctx.device)
        blocks = data.Blocks(corpus.train, args.seq_len)
        ours_model, bare_model = (training.build_model(args, ctx.device) for _ in range(2))
        ours_optimizer, bare_optimizer = (training.make_optimizer(m, args.lr) for m in (ours_model, bare_model))
        batches = data.ShardedBatches(blocks, args.batch_size, rank=ctx.rank, world_size=ctx.world_size)
        timer = profiling.StepTimer(ctx.device)
        steps = train_baseline.training_steps(ours_model, ours_optimizer, batches, args, ctx, timer)
        in_memory = [next(data.ShardedBatches(blocks, args.batch_size)) for _ in range(args.steps_a_round)]

        def ours() -> None:
            for _ in range(args.steps_a_round):
                step = next(steps)
                run.log(step=step.number, loss=step.loss.item())

        def bare() -> None:
            """The loop as one would write it down: data in memory, nothing measured, nothing kept but the last loss."""
            for inputs, targets in in_memory:
                inputs, targets = inputs.to(ctx.device), targets.to(ctx.device)
                with torch.autocast(ctx.device.type, dtype, enabled=dtype != torch.float32):
                    logits = bare_model(input_ids=inputs, use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
                loss.backward()
                if ctx.world_size > 1:
                    train_baseline.average_gradients(bare_model, ctx.world_size)
                torch.nn.utils.clip_grad_norm_(bare_model.parameters(), 1.0)
                bare_optimizer.step()
                bare_optimizer.zero_grad()
            loss.item()

        def seconds(loop: object) -> float:
            torch.distributed.barrier()
            begin = time.perf_counter()
            loop()  # type: ignore[operator]
            if ctx.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        for loop in (ours, bare):
            loop()  # warm-up
        order, pairs = random.Random(0), []
        for _ in range(args.rounds):
            # which goes first is drawn anew each round, so that a drift of the machine favours neither
            first, second = (ours, bare) if order.random() < 0.5 else (bare, ours)
            took = {first: seconds(first), second: seconds(second)}
            pairs.append((took[ours], took[bare]))
        ratios = sorted(bare_s / ours_s for ours_s, bare_s in pairs)
        tokens = args.batch_size * args.seq_len * args.steps_a_round * ctx.world_size
        phases = timer.median_ms()
        result = {
            "throughput_ratio": statistics.median(ratios),
            "throughput_ratio_p25": ratios[len(ratios) // 4],
            "throughput_ratio_p75": ratios[3 * len(ratios) // 4],
            "tokens_per_s": tokens / statistics.median(o for o, _ in pairs),
            "bare_tokens_per_s": tokens / statistics.median(b for _, b in pairs),
            "data_share": phases["data"] / phases["step"],
            "rounds": args.rounds,
            "world_size": ctx.world_size,
        }
        if ctx.is_main:
            print(
                f"ours {result['tokens_per_s']:,.0f} tokens/s, bare loop {result['bare_tokens_per_s']:,.0f}; ratio "
                f"{result['throughput_ratio']:.3f} (quartiles {result['throughput_ratio_p25']:.3f} to "
                f"{result['throughput_ratio_p75']:.3f}); waiting for data {result['data_share']:.2%} of a step"
            )
        return result


if __name__ == "__main__":
    script.run(main)

"""Data against tensor parallelism on one model: bytes, memory and time, on a fast and on a slow link.

You learn   data parallelism sends parameters, once a step; tensor parallelism sends activations, in every layer. Which
            is less depends on the batch; which may wait, and which holds the whole model, does not
Laptop      python ch02_hardware_parallelism/compare_dp_tp.py --rates 100mbit,5gbit         (hosts of a virtual cluster)
Loopback    torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/compare_dp_tp.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/compare_dp_tp.py --width 1024
Cluster     srun python ch02_hardware_parallelism/compare_dp_tp.py --width 1024 --heads 16
You see     bytes counted message by message, equal to the formula; what the network card counted beside them (headers
            make it a little more); states and activations a rank; the step on each link
"""

from __future__ import annotations

import argparse
import functools
import statistics

from ch01_intro.memory import SavedActivations
from ch02_hardware_parallelism import virtual_cluster
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.data_parallel import BucketedDataParallel
from ch02_hardware_parallelism.model import build
from ch02_hardware_parallelism.rates import add_rates, as_flags, at_rates, check_ranks
from ch02_hardware_parallelism.sequence_parallel import SequenceParallel
from ch02_hardware_parallelism.strategy import Strategy
from ch02_hardware_parallelism.tensor_parallel import TensorParallel
from ch02_hardware_parallelism.training import (
    SHARED_FLAGS,
    WARM_UP,
    Text,
    adamw,
    flags,
    shape_of,
    timed_ms,
    train_step,
)
from common import dist, script

KINDS: dict[str, type[Strategy]] = {
    "data": BucketedDataParallel,
    "tensor": TensorParallel,
    "sequence": SequenceParallel,
}
TITLES = {"data": "data parallel", "tensor": "tensor parallel", "sequence": "tensor + sequence"}


def state_bytes(strategy: Strategy) -> int:
    """Parameters, gradients and optimizer state that this rank holds."""
    parameters = sum(2 * p.numel() * p.element_size() for p in strategy.model.parameters())
    state = strategy.optimizer.state.values()
    return parameters + sum(v.numel() * v.element_size() for s in state for v in s.values() if v.dim())


def measure(args: argparse.Namespace, ctx: dist.Context) -> dict:
    shape, device = shape_of(args), str(ctx.device)
    whole = build(shape, seed=args.seed, device=device)
    parameters, tokens = sum(p.numel() for p in whole.parameters()), args.accumulation * args.batch_size * args.seq_len
    in_cluster = virtual_cluster.described()
    result: dict = {"world_size": ctx.world_size, "parameters": parameters, "tokens_a_step": tokens}
    result["bytes_equal_at_tokens"] = parameters / ((4 * shape.layers + 2) * shape.width + 3)

    def make(kind: str, *, by_hand: bool) -> Strategy:
        return KINDS[kind](build(shape, seed=args.seed, device=device), Comm(by_hand=by_hand), adamw(args.lr))

    for kind in KINDS:
        if reason := KINDS[kind].why_not(whole, ctx.world_size):
            raise script.UserError(reason)
        counted = make(kind, by_hand=True)
        batches, before = Text(args, ctx.device).step(), counted.comm.total_sent_bytes()
        with SavedActivations(counted.model) as saved:
            counted.backward(batches)
        counted.update()
        sent = counted.comm.total_sent_bytes() - before
        counted.close()
        everybody = ctx.gather([sent, state_bytes(counted), sum(saved.bytes_by_module.values())]) or [[0, 0, 0]]
        result |= {
            f"{kind}_bytes_formula": KINDS[kind].wire_bytes(whole, batches, ctx.world_size),
            f"{kind}_bytes_counted": sum(row[0] for row in everybody),
            f"{kind}_state_mib": max(row[1] for row in everybody) / 2**20,
            f"{kind}_activations_mib": max(row[2] for row in everybody) / 2**20,
        }
    strategies = {kind: make(kind, by_hand=False) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    carried = dict.fromkeys(KINDS, 0)
    text = Text(args, ctx.device)
    for _ in range(args.steps + WARM_UP):
        batches = text.step()
        for kind, strategy in strategies.items():
            card = virtual_cluster.nic_bytes()[0] if in_cluster else 0
            times[kind].append(timed_ms(functools.partial(train_step, strategy, batches), ctx.device))
            carried[kind] += virtual_cluster.nic_bytes()[0] - card if in_cluster else 0
    cards = ctx.gather(carried)
    for kind in KINDS:
        result[f"{kind}_step_ms"] = statistics.median(times[kind][WARM_UP:])
        if in_cluster and ctx.is_main:  # one rank a host: each card is one rank's
            on_cards = sum(card[kind] for card in cards) / (args.steps + WARM_UP)
            result[f"{kind}_card_over_formula"] = on_cards / result[f"{kind}_bytes_formula"]
        strategies[kind].close()
    return result


def show(result: dict) -> None:
    print(
        f"{result['parameters']:,} parameters, {result['tokens_a_step']:,} tokens a step, {result['world_size']} ranks"
    )
    heads = f"{'bytes by formula':>18}{'counted':>13}{'card':>7}{'state MiB':>11}{'activ. MiB':>12}{'step ms':>9}"
    print(" " * 19 + heads)
    for kind, title in TITLES.items():
        row = {key.removeprefix(f"{kind}_"): value for key, value in result.items() if key.startswith(f"{kind}_")}
        card = f"{row['card_over_formula']:.2f}x" if "card_over_formula" in row else "-"
        print(
            f"{title:19}{row['bytes_formula']:18,}{row['bytes_counted']:13,}{card:>7}{row['state_mib']:11.1f}"
            f"{row['activations_mib']:12.1f}{row['step_ms']:9.1f}"
        )
    print(f"tensor parallelism sends less below {result['bytes_equal_at_tokens']:,.0f} tokens a step", flush=True)


def main(argv: list[str] | None = None) -> dict:
    parser = flags(__doc__)
    parser.set_defaults(steps=5)
    add_rates(parser)
    args = parser.parse_args(argv)
    shape_of(args)
    check_ranks(args.rates)
    run = script.start(__file__, args)
    if args.rates:
        found = at_rates(__file__, as_flags(args, *SHARED_FLAGS), args.rates, run)
        first = next(iter(found.values()))
        result = {key: value for key, value in first.items() if not key.endswith(("step_ms", "card_over_formula"))}
        for rate, row in found.items():
            result |= {f"{key}_{rate}": row[key] for key in row if key.endswith(("step_ms", "card_over_formula"))}
        return result
    with dist.session(args.device) as ctx:
        result = measure(args, ctx)
        if ctx.is_main:
            show(result)
        return result


if __name__ == "__main__":
    script.run(main)

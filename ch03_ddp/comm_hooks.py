"""Send less: communication hooks held against exact gradients, the bytes on the card, the clock and the loss.

You learn   what fp16, bf16, int8 with error feedback and PowerSGD send in place of the gradients, what that costs in
            precision, and what it brings on a slow link
Laptop      python ch03_ddp/comm_hooks.py                         (hosts of a virtual cluster, at 200mbit)
Loopback    torchrun --standalone --nproc-per-node=2 ch03_ddp/comm_hooks.py --hooks none,bf16,int8
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/comm_hooks.py --preset small --seq-len 1024
Cluster     srun python ch03_ddp/comm_hooks.py --preset small --seq-len 1024
You see     half the bytes are half the communication, a quarter is a quarter; one step of int8 is a percent off, the
            sum of many is not, if what rounding took away is sent later. The loss hardly tells the hooks apart.

The hooks themselves, 5 to 30 lines each: hooks.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ch01_intro import training
from ch02_hardware_parallelism import virtual_cluster
from ch02_hardware_parallelism.rates import add_rates, as_flags, at_rates, check_ranks
from ch02_hardware_parallelism.training import WARM_UP, timed_ms
from ch03_ddp import hooks
from ch03_ddp.recorder import Recorder
from common import data, dist, lm, script

RATES = ["200mbit"]
FLAGS = (
    "preset", "data", "steps", "probe_steps", "batch_size", "seq_len", "lr", "bucket_mib", "val_tokens", "seed",
    "device",
)  # fmt: skip
Batch = tuple[torch.Tensor, torch.Tensor]


def hook_name(text: str) -> str:
    """argparse type: the name of a hook."""
    if text not in hooks.HOOKS:
        raise argparse.ArgumentTypeError(f"there is no hook {text!r}; there are {', '.join(hooks.HOOKS)}")
    return text


def wrap(args: argparse.Namespace, ctx: dist.Context) -> DistributedDataParallel:
    ids = [ctx.device.index] if ctx.device.type == "cuda" else None
    model = training.build_model(args, ctx.device)
    return DistributedDataParallel(model, ids, bucket_cap_mb=args.bucket_mib, gradient_as_bucket_view=True)


def batches(args: argparse.Namespace, corpus: data.Corpus, ctx: dist.Context) -> Callable[[], Batch]:
    blocks = data.Blocks(corpus.train, args.seq_len)
    row = data.ShardedBatches(blocks, args.batch_size, rank=ctx.rank, world_size=ctx.world_size, seed=args.seed)

    def take() -> Batch:
        inputs, targets = next(row)
        return inputs.to(ctx.device), targets.to(ctx.device)

    return take


def backward(ddp: DistributedDataParallel, batch: Batch) -> None:
    logits = ddp(input_ids=batch[0], use_cache=False).logits
    F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten()).backward()


def gradient(ddp: DistributedDataParallel, batch: Batch) -> torch.Tensor:
    """The whole model's gradient as one vector, as the hook leaves it."""
    ddp.module.zero_grad()
    backward(ddp, batch)
    return torch.cat([p.grad.flatten() for p in ddp.module.parameters() if p.grad is not None])


def probe(args: argparse.Namespace, corpus: data.Corpus, ctx: dist.Context) -> tuple[dict, hooks.Buckets]:
    """How far the hooks' gradients are from the exact ones of the same weights, and the buckets' shapes.

    error: of the last step, ||g - exact|| / ||exact||. error_of_sum: the same of the sum over the steps that PowerSGD
    compresses, which is what SGD's weights would be off by.
    """
    exact = wrap(args, ctx)
    recorder, take = Recorder(exact), batches(args, corpus, ctx)
    models = {name: wrap(args, ctx) for name in args.hooks}
    for name, ddp in models.items():
        hooks.register(ddp, name)
    sums: dict[str, torch.Tensor] = {}
    found: dict = {}
    for step in range(args.probe_steps + hooks.POWER_START):
        batch = take()
        recorder.clear()
        wanted = gradient(exact, batch)
        got = {name: gradient(ddp, batch) for name, ddp in models.items()}
        if step >= hooks.POWER_START:
            for name, vector in {"exact": wanted, **got}.items():
                sums[name] = sums[name] + vector if name in sums else vector
            found = {name: {"error": distance(vector, wanted)} for name, vector in got.items()}
    for name in models:
        found[name]["error_of_sum"] = distance(sums[name], sums["exact"])
    shape_of = {name: p.shape for name, p in exact.module.named_parameters()}
    return found, [[shape_of[name] for name in bucket.names] for bucket in recorder.buckets]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


class Training:
    """A model with its hook and optimizer."""

    def __init__(self, args: argparse.Namespace, ctx: dist.Context, name: str) -> None:
        self.ddp = wrap(args, ctx)
        hooks.register(self.ddp, name)
        self.optimizer = training.make_optimizer(self.ddp.module, args.lr)
        self.step_ms: list[float] = []
        self.card_bytes: list[int] = []

    def step(self, batch: Batch) -> None:
        backward(self.ddp, batch)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(args: argparse.Namespace, corpus: data.Corpus, ctx: dist.Context) -> dict[str, Training]:
    """The same steps with every hook, in turn: all meet the same machine."""
    trainings = {name: Training(args, ctx, name) for name in args.hooks}
    take, counts = batches(args, corpus, ctx), virtual_cluster.described() is not None
    for _ in range(args.steps):
        batch = take()
        for one in trainings.values():
            ctx.barrier("before")  # all that was sent before has left
            before = virtual_cluster.nic_bytes()[0] if counts else 0
            one.step_ms.append(timed_ms(partial(one.step, batch), ctx.device))
            ctx.barrier("after")
            one.card_bytes.append(virtual_cluster.nic_bytes()[0] - before if counts else 0)
    return trainings


def measure(args: argparse.Namespace, ctx: dist.Context) -> dict:
    corpus = training.load_corpus(args)
    errors, buckets = probe(args, corpus, ctx)
    trainings = train(args, corpus, ctx)
    rows: dict[str, dict[str, Any]] = {}
    for name, one in trainings.items():
        sent = hooks.HOOKS[name].sent_bytes(buckets, ctx.world_size)
        ms = one.step_ms[WARM_UP:]
        card = statistics.median(one.card_bytes[WARM_UP:])
        rows[name] = {
            "sent_mib": sent / 2**20,
            "card_mib": card / 2**20 if card else None,
            "card_over_formula": card / sent if card else None,
            "step_ms": statistics.median(ms),
            "step_ms_quartiles": statistics.quantiles(ms, n=4)[::2] if len(ms) > 1 else ms * 2,
            **errors[name],
            "val_loss": training.evaluate(one.ddp.module, corpus, args, ctx),
        }
    first = next(iter(rows.values()))
    for row in rows.values():
        row["speedup"] = first["step_ms"] / row["step_ms"]
    return {
        "world_size": ctx.world_size,
        "buckets": len(buckets),
        "steps": args.steps,
        **{f"{name.replace('-', '_')}_{key}": value for name, row in rows.items() for key, value in row.items()},
        "rows": rows,
    }


def show(result: dict) -> None:
    print(f"{'a rank, a step':18}{'sent MiB':>9}{'on card':>9}{'step ms':>9}{'quartiles':>17}{'speed':>7}{'error':>10}"
          f"{'error of sum':>14}{'val_loss':>10}")  # fmt: skip
    for name, row in result["rows"].items():
        card = "-" if row["card_mib"] is None else f"{row['card_mib']:.2f}"
        low, high = row["step_ms_quartiles"]
        print(f"{name:18}{row['sent_mib']:9.2f}{card:>9}{row['step_ms']:9.1f}{f'{low:.0f} - {high:.0f}':>17}"
              f"{row['speedup']:6.2f}x{row['error']:10.1e}{row['error_of_sum']:14.1e}{row['val_loss']:10.4f}",
              flush=True)  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano", help=", ".join(lm.PRESETS))
    parser.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, or a hub data set id")
    parser.add_argument("--hooks", type=script.comma_list(hook_name), default=list(hooks.HOOKS))
    parser.add_argument("--steps", type=script.at_least(WARM_UP + 1), default=30, help="of training, with each hook")
    parser.add_argument(
        "--probe-steps", type=script.at_least(1), default=8, help="gradients to hold against exact ones"
    )
    parser.add_argument("--batch-size", type=script.at_least(1), default=4, help="sequences a rank")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--lr", type=script.positive, default=1e-3)
    parser.add_argument("--bucket-mib", type=script.positive, default=2)
    parser.add_argument("--val-tokens", type=script.at_least(1), default=8192)
    parser.set_defaults(dtype="fp32")
    add_rates(parser)
    args = parser.parse_args(argv)
    args.hooks = list(dict.fromkeys(args.hooks))
    lm.config(args.preset)  # a misspelt name is found before anything starts
    if args.rates is None and dist.read_launch().world_size == 1:
        args.rates = RATES
    check_ranks(args.rates)
    run = script.start(__file__, args)
    if args.rates:
        training.load_corpus(args)  # once, not by each host while the others wait
        found = at_rates(__file__, [*as_flags(args, *FLAGS), "--hooks", ",".join(args.hooks)], args.rates, run)
        flat = {rate: {k: v for k, v in row.items() if k != "rows"} for rate, row in found.items()}
        same = {
            key: value for key, value in next(iter(flat.values())).items() if key in ("world_size", "buckets", "steps")
        }
        return same | {f"{k}_{rate}": v for rate, row in flat.items() for k, v in row.items() if k not in same}
    with dist.session(args.device) as ctx:
        result = measure(args, ctx)
        if ctx.is_main:
            show(result)
        return result


if __name__ == "__main__":
    script.run(main)

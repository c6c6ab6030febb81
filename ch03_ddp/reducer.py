"""Inside DDP's reducer: who is in which bucket, when buckets fill, leave and land, recorded on a live model.

You learn   what DDP does at its construction, in the first step and in all others; where gradients are synchronised;
            what find_unused_parameters, static_graph and gradient_as_bucket_view change
Laptop      torchrun --standalone --nproc-per-node=2 ch03_ddp/reducer.py
Slow link   python -m ch02_hardware_parallelism.virtual_cluster --rate 1gbit -- ch03_ddp/reducer.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/reducer.py --preset small --seq-len 1024 --bucket-mib 25
Cluster     srun python ch03_ddp/reducer.py --preset small --seq-len 1024 --bucket-mib 25
You see     one bucket in the first step; after it, buckets in the order in which gradients really become ready;
            timeline.png: each bucket flies under the backward of the layers below; only the last ones show
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ch03_ddp.recorder import Recorder, Step, draw, expected_buckets, storage_bytes
from common import dist, lm, script

OPTIONS: dict[str, dict[str, bool]] = {
    "defaults": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


class Lab:
    """A model under DDP, random tokens that differ by rank, and recorded steps."""

    def __init__(self, args: argparse.Namespace, ctx: dist.Context, **options: Any) -> None:
        self.ctx = ctx
        self.model = lm.build(lm.config(args.preset, args.seq_len), ctx.device, seed=args.seed + ctx.rank)
        self.weights_before = lm.weights_sha256(self.model)
        ids = [ctx.device.index] if ctx.device.type == "cuda" else None
        self.ddp = DistributedDataParallel(self.model, ids, bucket_cap_mb=args.bucket_mib, **options)
        self.weights_after = lm.weights_sha256(self.model)
        self.recorder = Recorder(self.ddp)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.random = torch.Generator().manual_seed(args.seed + ctx.rank)
        self.shape, self.vocab = (args.batch_size, args.seq_len + 1), self.model.config.vocab_size

    def backward(self) -> Step | None:
        """Forward and backward of a batch; what was recorded, None if no bucket left (no_sync)."""
        tokens = torch.randint(self.vocab, self.shape, generator=self.random).to(self.ctx.device)
        self.recorder.clear()
        begin = self.recorder.clock.mark()
        logits = self.ddp(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        forward = self.recorder.clock.mark()
        loss.backward()
        end = self.recorder.clock.mark()
        return self.recorder.step(begin, forward, end) if self.recorder.buckets else None

    def step(self) -> Step:
        recorded = self.backward()
        assert recorded
        self.optimizer.step()
        self.optimizer.zero_grad()
        return recorded

    def gradients_agree(self) -> bool:
        """Whether all ranks hold the same bits."""
        flat = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        of_ranks = self.everywhere(flat)
        return all(torch.equal(of_ranks[0], other) for other in of_ranks)

    def held(self) -> tuple[int, bool]:
        """Bytes behind all gradients and buckets, and whether a gradient lies in its bucket."""
        grads, buffers = [p.grad for p in self.model.parameters() if p.grad is not None], self.recorder.buffers
        both = storage_bytes([*grads, *buffers])
        return both, both == storage_bytes(buffers)

    def everywhere(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(x) for _ in range(self.ctx.world_size)]
        torch.distributed.all_gather(found, x)
        return found


def construction(lab: Lab, ctx: dist.Context) -> dict:
    """Ranks that start from different seeds hold rank 0's weights once DDP is built."""
    before = ctx.exchange("before", lab.weights_before)
    after = ctx.exchange("after", lab.weights_after)
    broadcast = set(after) == {before[0]}
    if ctx.is_main:
        counts = f"{len(set(before))} different models before, {len(set(after))} after"
        print(f"construction: {ctx.world_size} ranks, {counts}")
    return {"models_before": len(set(before)), "models_after": len(set(after)), "rank_0_was_broadcast": broadcast}


def short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def buckets(lab: Lab, first: Step, later: Step, ctx: dist.Context) -> dict:
    """Buckets before and after the rebuild, the order of readiness beside that of definition."""
    ready = list(first.gradients_ms)
    rank_0_ready = ctx.exchange("ready", " ".join(ready))[0].split()  # DDP takes rank 0's order everywhere
    expected = expected_buckets(lab.ddp, rank_0_ready)
    by_definition = list(reversed(lab.recorder.name_of.values()))
    if ctx.is_main:
        print(
            f"first step: {len(first.buckets)} bucket of {len(first.buckets[0].names)} parameters; later, by readiness:"
        )
        print(f"bucket{'MiB':>7}{'ready':>9}{'launched':>10}{'finished ms':>13}{'hidden':>8}  parameters")
        for b in later.buckets:
            names = [short(name) for name in b.names]
            told = f"{names[0]} ... {names[-1]} ({len(names)})" if len(names) > 2 else ", ".join(names)
            times = f"{b.ready_ms:9.1f}{b.launched_ms:10.1f}{b.finished_ms:13.1f}"
            print(f"{b.index:6}{b.bytes / 2**20:7.2f}{times}{b.hidden(later.backward_ms):8.0%}  {told}")
        layer = ".".join(short(ready[1]).split(".")[:2]) + "."  # the one whose gradients come first
        for told, order in (("from the end", by_definition), ("as they are ready", ready)):
            inside = [short(name).rpartition(".")[2] for name in order if short(name).startswith(layer)]
            print(f"{layer}* {told:18} {' '.join(inside)}")
    return {
        "buckets_first_step": len(first.buckets),
        "buckets_later": len(later.buckets),
        "has_rebuilt": bool(lab.ddp._get_ddp_logging_data()["has_rebuilt_buckets"]),
        "buckets_as_by_rule": [b.names for b in later.buckets] == expected,
        "ready_in_order_of_definition": ready == by_definition,
    }


def synchronisation(lab: Lab, ctx: dist.Context) -> dict:
    """Two micro-batches, one optimizer step: where do the ranks' gradients become equal?"""
    with lab.ddp.no_sync():
        lab.backward()
    sent_in_no_sync, agree_in_no_sync = len(lab.recorder.buckets), lab.gradients_agree()
    lab.backward()
    sent_in_backward, agree_after_backward = len(lab.recorder.buckets), lab.gradients_agree()
    lab.optimizer.step()
    sent_in_step = len(lab.recorder.buckets) - sent_in_backward
    lab.optimizer.zero_grad()
    found = {
        "agree_in_no_sync": agree_in_no_sync,
        "agree_after_backward": agree_after_backward,
        "buckets_sent_in_no_sync": sent_in_no_sync,
        "buckets_sent_in_backward": sent_in_backward,
        "buckets_sent_in_optimizer_step": sent_in_step,
    }
    if ctx.is_main:
        same = {True: "the same on all ranks", False: "different on each rank"}
        print(f"no_sync:        {sent_in_no_sync} buckets sent, gradients {same[agree_in_no_sync]}")
        print(f"backward:       {sent_in_backward} buckets sent, gradients {same[agree_after_backward]}")
        print(f"optimizer.step: {sent_in_step} buckets sent")
    return found


def options(args: argparse.Namespace, ctx: dist.Context) -> dict:
    """What DDP's options change: the buckets, the memory of gradients and buckets, the step."""
    found: dict = {}
    if ctx.is_main:
        titles = f"{'buckets in steps 1, 2, 3':>26}{'.grad is in':>16}{'gradients, buckets':>20}{'step':>11}"
        print(f"{'':24}{titles}")
    for name, chosen in OPTIONS.items():
        lab = Lab(args, ctx, **chosen)
        steps = [lab.step() for _ in range(args.steps)]
        lab.backward()
        memory_bytes, in_bucket = lab.held()
        counts = [len(step.buckets) for step in steps[:3]]
        ms = statistics.median(step.end_ms for step in steps[2:])
        row = {"buckets": counts, "gradients_mib": memory_bytes / 2**20, "grad_is_bucket": in_bucket, "ms": ms}
        found |= {f"{name}_{key}": value for key, value in row.items()}
        if ctx.is_main:
            where = "its bucket" if in_bucket else "its own memory"
            told = f"{', '.join(map(str, counts)):>26}{where:>16}{memory_bytes / 2**20:16.1f} MiB{ms:8.1f} ms"
            print(f"{name:24}{told}", flush=True)
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano", help=", ".join(lm.PRESETS))
    parser.add_argument("--bucket-mib", type=script.positive, default=2)
    parser.add_argument("--batch-size", type=script.at_least(1), default=4, help="sequences a rank")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--steps", type=script.at_least(3), default=8, help="recorded steps; the median one is drawn")
    args = parser.parse_args(argv)
    lm.config(args.preset)  # a misspelt name is found before anything starts
    if dist.read_launch().world_size < 2:
        raise script.UserError("one rank has nothing to reduce; start it with torchrun --nproc-per-node=2")
    run = script.start(__file__, args)
    with dist.session(args.device) as ctx:
        lab = Lab(args, ctx)
        result = {"world_size": ctx.world_size, **construction(lab, ctx)}
        steps = [lab.step() for _ in range(args.steps + 1)]
        later = sorted(steps[2:], key=lambda step: step.end_ms)[len(steps[2:]) // 2]
        result |= buckets(lab, steps[0], later, ctx) | {"hidden": later.hidden(), "step_ms": later.end_ms}
        result |= synchronisation(lab, ctx)
        if ctx.is_main:
            title = f"{args.preset}, {ctx.world_size} ranks, buckets of {args.bucket_mib:g} MiB: a recorded step"
            draw(later, title, run.path("timeline.png"))
            draw(steps[0], f"{title}, the first one", run.path("timeline-first-step.png"))
        result |= options(args, ctx)
    wanted = {
        "rank_0_was_broadcast": True, "agree_in_no_sync": False, "agree_after_backward": True,
        "buckets_sent_in_no_sync": 0, "buckets_sent_in_optimizer_step": 0, "buckets_as_by_rule": True,
    }  # fmt: skip
    if wrong := [name for name, value in wanted.items() if result[name] != value]:
        raise script.CheckFailed(f"DDP did not do what this exercise says it does: {', '.join(wrong)}", result)
    return result


if __name__ == "__main__":
    script.run(main)

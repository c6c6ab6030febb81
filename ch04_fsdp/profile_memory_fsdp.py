"""Where the memory of a sharded training step goes, what would help most, and whether it does.

You learn   to read a step's memory phase by phase, to tell what is held from what passes through, to predict what
            recomputation, resharding, sync_each, smaller micro-batches or offloading would save, and to check it
Laptop      torchrun --standalone --nproc-per-node=2 ch04_fsdp/profile_memory_fsdp.py
Others      ... --strategy grad; --recompute block; --accumulation 4 (--sync-each); --strategy replicate
GPU node    torchrun --standalone --nproc-per-node=gpu ch04_fsdp/profile_memory_fsdp.py --preset 1b --batch-size 4 \
                --seq-len 2048 --dtype bf16      (also a snapshot of the allocator, snapshot.pickle)
Cluster     sbatch ch03_ddp/launch/train.sbatch ch04_fsdp/profile_memory_fsdp.py --preset 8b --strategy hybrid
You see     memory.png and a table of phases; parameters, gradients, moments and activations by kind of module; then
            each remedy with what it should save by the shares just measured, and what it saved when tried

Real memory: torch's allocator on a GPU; on a CPU the process's resident set, with glibc told to return what is freed
at once (resident.py), and as a second witness what malloc has given out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ch01_intro.memory import KINDS, State
from ch03_ddp.feed import Batch
from ch04_fsdp import disk, model, options, phases, resident, step
from ch04_fsdp.phases import MIB, MemoryLine, Moment, ShardedActivations
from ch04_fsdp.sharding import Sharding
from ch04_fsdp.traffic import padded, unit_parameters
from common import dist, lm, script

IN_LAYERS = ("attention", "MLP", "norms", "other")


@dataclass(frozen=True)
class Setting:
    """What a remedy may change."""

    sharding: Sharding
    batch_size: int
    accumulation: int
    sync_each: bool


@dataclass(frozen=True)
class Remedy:
    """A change, and how many bytes it should take off a phase. The peak may then be in another phase."""

    name: str
    saves: Callable[[str], float]
    setting: Setting

    def estimate(self, moments: Sequence[Moment]) -> float:
        """Bytes off the peak."""
        return max(m.peak for m in moments) - max(m.peak - self.saves(m.label) for m in moments)


@dataclass(frozen=True)
class Profile:
    line: MemoryLine
    states: dict[str, State]
    activations: dict[str, int]  # by kind of module, of one micro-batch
    gathered: dict[str, int]  # by unit, of the whole weights as they travel
    shards: int  # ranks that share a copy
    step_s: float

    @property
    def peak(self) -> int:
        return self.line.peak.peak

    @property
    def second(self) -> list[Moment]:
        """The second step, and what was there before it."""
        begin = [moment.label for moment in self.line.moments].index("zero_grad")
        return self.line.moments[begin:]


def measure(setting: Setting, args: argparse.Namespace, ctx: dist.Context) -> Profile:
    """Build the model, take two steps, and forget it. The first makes the moments; the second has them, and its peak.

    What autograd saves is counted in the first, which has one micro-batch only.
    """
    gc.collect()
    sharding = setting.sharding
    line = MemoryLine(ctx.device)
    wrapped = model.build(
        args.preset, sharding, ctx, seq_len=args.seq_len, seed=args.seed, offload_dir=args.offload_dir
    )
    inner = model.inner(wrapped)
    optimizer = model.make_optimizer(inner, 1e-4)
    saved = ShardedActivations(inner)
    line.mark("build")
    for number in range(2):
        began = line.moments[-1].seconds
        batches = tokens(setting, args, inner.config.vocab_size, ctx)[: None if number else 1]
        count = sum(inputs.numel() for inputs, _ in batches) * ctx.world_size
        with line.hooks(inner), contextlib.nullcontext() if number else saved:
            step.backward(wrapped, batches, count, ctx.world_size, sharding, sync_each=setting.sync_each)
            line.mark("backward embed_tokens")
        step.clip(wrapped, 1.0)
        line.mark("clip")
        tier = disk.of(inner)
        tier.step(optimizer) if tier else optimizer.step()
        line.mark("optimizer")
        states = phases.state_bytes(inner, optimizer)
        optimizer.zero_grad()
        line.mark("zero_grad")
    world = ctx.world_size, ctx.device, ctx.launch.local_world_size
    shards = 1 if sharding.strategy == "replicate" else sharding.mesh(*world).size(-1)
    units = unit_parameters(inner)
    gathered = {name: sum(padded(p, shards) for p in own) * sharding.dtype.itemsize for name, own in units.items()}
    return Profile(line, states, saved.by_kind(), gathered, shards, line.moments[-1].seconds - began)


def tokens(setting: Setting, args: argparse.Namespace, vocab: int, ctx: dist.Context) -> list[Batch]:
    """The micro-batches of a step, the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(args.seed + ctx.rank)
    shape = setting.accumulation, 2, setting.batch_size, args.seq_len
    numbers = torch.randint(vocab, shape, generator=generator).to(ctx.device)
    return [(inputs, targets) for inputs, targets in numbers]


def depth(label: str, layers: int) -> int:
    """How many layers have finished forward and not begun backward in a phase: whose activations must wait in it."""
    if label in ("forward head", "loss", "backward head"):
        return layers
    found = re.search(r"layers\.(\d+)", label)
    return int(found[1]) if found else 0


def remedies(now: Setting, found: Profile, args: argparse.Namespace, config: Any) -> list[Remedy]:
    """What can be changed, and what each should take off each phase by the shares that were measured."""
    sharding, layers = now.sharding, config.num_hidden_layers
    gathered = max((size for name, size in found.gathered.items() if name.startswith("layers.")), default=0)
    keeps_weights = sharding.strategy in ("grad", "hybrid-grad")
    keeps = statistics.mean(found.line.kept()) - (gathered if keeps_weights else 0)
    layer_input = now.batch_size * args.seq_len * config.hidden_size * sharding.dtype.itemsize
    held = sum(row.parameters + row.gradients + row.optimizer for row in found.states.values())
    whole = 4 * sum(found.gathered.values()) // sharding.dtype.itemsize  # of all gradients, float32

    def waiting(size: float) -> Callable[[str], float]:
        """So much less for each layer that waits for its backward."""
        return lambda label: depth(label, layers) * size

    def changed(**settings: Any) -> Setting:
        return replace(now, sharding=replace(sharding, **settings))

    made = []
    if sharding.recompute == "none":
        made.append(Remedy("recompute block", waiting(keeps - layer_input), changed(recompute="block")))
    if keeps_weights:
        other = "full" if sharding.strategy == "grad" else "hybrid"
        made.append(Remedy(f"strategy {other}", waiting(gathered), changed(strategy=other)))
    if sharding.strategy == "replicate" and args.world_size > 1:
        made.append(Remedy("strategy full", lambda _: held - held / args.world_size, changed(strategy="full")))
    if now.accumulation > 1 and found.shards > 1 and not now.sync_each:
        made.append(Remedy("sync-each", lambda _: whole - whole / found.shards, replace(now, sync_each=True)))
    if now.batch_size > 1:
        smaller = replace(now, batch_size=now.batch_size // 2, accumulation=now.accumulation * 2, sync_each=True)
        share = 1 - smaller.batch_size / now.batch_size
        logits = found.activations.get("loss", 0) + found.activations.get("head", 0)
        fewer = waiting(share * keeps)
        made.append(Remedy("half the micro-batch, sync-each",
                           lambda at: fewer(at) + share * (logits if at == "loss" else keeps), smaller))  # fmt: skip
    if args.on_gpu and sharding.strategy != "replicate" and sharding.offload == "none":
        made.append(Remedy("offload cpu", lambda _: held, changed(offload="cpu")))
    return made


def show_phases(moments: Sequence[Moment], source: str) -> None:
    """The second step. A phase of several micro-batches is shown once, with its highest peak."""
    print(f"\n{'second step':24}{'ms':>8}{'held after':>12}{'peak inside':>13}{'malloc':>9}   MiB; {source}")
    rows: dict[str, list[tuple[float, Moment]]] = {}
    for before, after in itertools.pairwise(moments):
        rows.setdefault(after.label, []).append(((after.seconds - before.seconds) * 1e3, after))
    for label, found in rows.items():
        last, peak = found[-1][1], max(moment.peak for _, moment in found)
        print(f"{label:24}{sum(ms for ms, _ in found):8.1f}{last.held / MIB:12.1f}{peak / MIB:13.1f}"
              f"{last.malloc / MIB:9.1f}")  # fmt: skip


def show_modules(found: Profile) -> None:
    print(f"\n{'MiB on this rank':20}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'activations':>13}")
    rows = []
    for kind in KINDS:
        row = found.states.get(kind, State())
        rows.append((kind, [row.parameters, row.gradients, row.optimizer, found.activations.get(kind, 0)]))
    rows.append(("all", [sum(column) for column in zip(*(sizes for _, sizes in rows), strict=True)]))
    for kind, sizes in rows:
        if any(sizes):
            print(f"{kind:20}" + "".join(f"{size / MIB:{12 + (i == 3)}.2f}" for i, size in enumerate(sizes)))
    left, saved = sum(found.line.kept()), sum(found.activations.get(kind, 0) for kind in IN_LAYERS)
    rest = "; the rest: gathered weights, or what selective checkpointing keeps" if left > 1.1 * saved else ""
    print(f"the layers' forward left {left / MIB:.2f} MiB behind, autograd saved {saved / MIB:.2f} of it{rest}")
    units = sorted(found.gathered.values())
    print(f"beside them, in passing: gathered weights of {units[0] / MIB:.2f} to {units[-1] / MIB:.2f} MiB a unit, "
          f"{sum(units) / MIB:.2f} in all")  # fmt: skip


def try_remedies(args: argparse.Namespace, now: Setting, found: Profile, ctx: dist.Context) -> list[dict[str, Any]]:
    """Each remedy by itself: what it should save, what it did, and how much longer the step was."""
    if ctx.is_main:
        print(f"\n{'what would help':34}{'by the shares':>14}{'when tried':>12}{'step':>8}    (MiB off the peak)")
    rows = []
    for remedy in remedies(now, found, args, lm.config(args.preset, args.seq_len)):
        tried = measure(remedy.setting, args, ctx)
        row = {"name": remedy.name, "estimate": remedy.estimate(found.second), "saved": found.peak - tried.peak}
        rows.append(row)
        if ctx.is_main:
            print(f"{remedy.name:34}{row['estimate'] / MIB:14.1f}{row['saved'] / MIB:12.1f}"
                  f"{tried.step_s / found.step_s:7.2f}x", flush=True)  # fmt: skip
    if ctx.is_main and not args.on_gpu:
        print("offload cpu: on a CPU shards and their offload are the same memory; --offload disk is another")
    return sorted(rows, key=lambda row: -row["saved"])


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    run = script.start(__file__, args)
    with dist.session(args.device) as ctx:
        args.on_gpu, args.world_size = ctx.device.type == "cuda", ctx.world_size
        now = Setting(options.sharding(args, ctx), args.batch_size, args.accumulation, args.sync_each)
        if args.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        else:
            if not resident.return_at_once() and ctx.is_main:
                print("this C library keeps what is freed: the peaks hold, what is held after a phase does not")
            measure(now, args, ctx)  # what is made once a process: threads, connections, kernels
        found = measure(now, args, ctx)
        what = f"{args.preset}, {args.batch_size} x {args.seq_len}, {args.strategy} on {ctx.world_size} ranks"
        what += f", recompute {args.recompute}, {str(now.sharding.dtype)[6:]}"
        line = found.line
        if ctx.is_main:
            print(what)
            show_phases(found.second, line.source)
            show_modules(found)
            phases.plot(line.moments, run.path("memory.png"), f"Two steps: {what}\n{line.source}")
            if args.on_gpu:
                snapshot = run.path("snapshot.pickle")
                torch.cuda.memory._dump_snapshot(str(snapshot))
                print(f"every allocation and its stack: drop {snapshot} on https://pytorch.org/memory_viz, or\n"
                      f"python -m torch.cuda._memory_viz trace_plot {snapshot} -o snapshot.html")  # fmt: skip
        if args.on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        tried = [] if args.no_try else try_remedies(args, now, found, ctx)
        if ctx.is_main and tried:
            best = tried[0]
            worth = best["saved"] > 0.02 * found.peak
            print(
                "what would help most: "
                + (best["name"] if worth else "nothing of this; more ranks, or a smaller model")
            )
        ctx.barrier("report written")
    totals = {
        f"{name}_mib": sum(getattr(row, name) for row in found.states.values()) / MIB
        for name in ("parameters", "gradients", "optimizer")
    }
    return {
        "strategy": args.strategy,
        "world_size": args.world_size,
        "peak_mib": found.peak / MIB,
        "peak_phase": line.peak.label,
        "held_mib": line.moments[-1].held / MIB,
        **totals,
        "activations_mib": sum(found.activations.values()) / MIB,
        "layer_keeps_mib": max(line.kept()) / MIB,
        "memory_source": line.source,
        **({"best": tried[0]["name"], "best_estimate_mib": tried[0]["estimate"] / MIB,
            "best_saved_mib": tried[0]["saved"] / MIB} if tried else {}),
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    made.add_argument("--batch-size", type=script.at_least(1), default=8, help="sequences a rank and micro-batch")
    made.add_argument("--seq-len", type=script.at_least(2), default=256)
    made.add_argument("--accumulation", type=script.at_least(1), default=1, help="micro-batches a step")
    made.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="fp32", help="of gathered weights, and matmuls"
    )
    made.add_argument("--no-try", action="store_true", help="only measure: do not try what would help")
    options.add_sharding_flags(made)
    args = made.parse_args(argv)
    options.check_sharding(args)
    if args.memory_cap_gib:
        raise script.UserError("--memory-cap-gib is for training; here memory is measured, leave it out")
    return args


if __name__ == "__main__":
    script.run(main)

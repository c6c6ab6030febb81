"""Profile one training setup: where its memory is, and which ceiling each phase of a step runs into.

You learn   that weights, gradients and Adam's moments cost 16 bytes a parameter whatever the batch, and that saved
            activations grow with the tokens of a batch: measured from autograd, beside a formula; to read a memory
            timeline; to tell compute bound from memory-bandwidth bound, network bound and overhead bound by figures
Laptop      python ch01_intro/profile_memory.py --batch-size 8
GPU node    python ch01_intro/profile_memory.py --preset small --batch-size 16 --seq-len 1024
Two ranks   torchrun --standalone --nproc-per-node=2 ch01_intro/profile_memory.py       (adds the communication phase)
Cluster     srun python ch01_intro/profile_memory.py --preset small --batch-size 16 --seq-len 1024
You see     a table by kind of module (parameters, gradients, optimizer, activations measured and by formula), the
            timeline timeline.png (the first step allocates the optimizer's state), a verdict with its evidence for
            each phase and roofline.png, the ten costliest operators, trace.json for chrome://tracing or Perfetto
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from ch01_intro import memory, roofline, training
from ch01_intro.memory import KINDS, MIB
from ch01_intro.roofline import Work
from ch01_intro.train_baseline import training_steps
from common import data, dist, lm, logs, profiling, script

log = logs.get_logger()
TRACED_STEPS = 3  # from the very first, which allocates gradients and optimizer state
WARM_UP_STEPS = 2


class ProbedTimer(profiling.StepTimer):
    """A step timer that can also run a context of ours around each phase: the profiled loop is the baseline's own."""

    probe: Callable[[str], AbstractContextManager[object]] | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name), self.probe(name) if self.probe else contextlib.nullcontext():
            yield


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = training.training_parser(__doc__)
    parser.set_defaults(steps=20)
    args = parser.parse_args(argv)
    lm.config(args.preset, args.seq_len)  # a name that does not exist ends here, before a tokenizer is looked for
    if args.steps <= WARM_UP_STEPS:
        raise script.UserError(f"--steps {args.steps} leaves none to time after {WARM_UP_STEPS} to warm up; take more")
    return args


def main(argv: list[str] | None = None) -> dict[str, object]:
    args = parse_args(argv)
    timed_steps, args.steps = args.steps, args.steps + TRACED_STEPS + 1
    run = script.start(__file__, args)
    corpus = training.load_corpus(args)

    with dist.session(args.device, threads=args.threads) as ctx:
        dtype = training.compute_dtype(args.dtype, ctx.device)
        model = training.build_model(args, ctx.device)
        optimizer = training.make_optimizer(model, args.lr)
        blocks = data.Blocks(corpus.train, args.seq_len)
        batches = data.ShardedBatches(blocks, args.batch_size, rank=ctx.rank, world_size=ctx.world_size, seed=args.seed)
        timer = ProbedTimer(ctx.device)
        steps = training_steps(model, optimizer, batches, args, ctx, timer)

        # 1. The first steps under the profiler, with marks on the timeline. Each rank keeps its own trace.
        timeline = memory.Timeline(model, optimizer, ctx.device)
        timer.probe = timeline.phase
        folder = Path(ctx.exchange("run folder", str(run.folder.absolute()))[0])
        folder.mkdir(parents=True, exist_ok=True)  # on the other nodes
        trace = folder / ("trace.json" if ctx.is_main else f"trace-rank{ctx.rank}.json")
        with profiling.trace(trace, ctx.device, memory=True) as table, timeline.hooks():
            for _ in range(TRACED_STEPS):
                next(steps)
        trace_events = timeline.read(trace)

        # 2. One step that counts: what autograd saves in forward, what the operators read and write in each phase,
        #    and the state that is alive when the optimizer starts.
        saved = memory.SavedActivations(model)
        traffic: dict[str, roofline.Traffic] = defaultdict(roofline.Traffic)
        state: dict[str, memory.State] = {}

        @contextlib.contextmanager
        def counting(phase: str) -> Iterator[None]:
            if phase == "optimizer":
                state.update(memory.state_bytes(model, optimizer))
            with saved if phase == "forward" else contextlib.nullcontext(), traffic[phase]:
                yield

        timer.probe = counting
        next(steps)

        # 3. The steps that are timed, with nothing in their way.
        timer.probe = None
        profiling.reset_peak_memory(ctx.device)
        timer.restart()
        with logs.Progress(timed_steps, "timing") as progress:
            for number in range(timed_steps):
                loss = next(steps).loss
                roofline.synchronize(ctx.device)  # so that each step's time is its own
                progress.update(number + 1)
        loss_last = loss.item()
        rows = timer.rows_ms(skip=TRACED_STEPS + 1 + WARM_UP_STEPS)
        phases_ms = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        used = profiling.memory(ctx.device)
        ceilings = roofline.measure_ceilings(ctx, dtype)

        # 4. What it means.
        formula = memory.activation_formula(model.config, args.batch_size, args.seq_len, dtype)
        works = works_of(model.config, args, ctx, phases_ms, traffic)
        verdicts = {work.name: roofline.classify(work, ceilings) for work in works}
        measured = saved.by_kind()
        if ctx.is_main:
            what = f"{args.preset}, batch {args.batch_size} x {args.seq_len}, {str(dtype)[6:]}, {ctx.device.type}"
            memory.plot_timeline(
                timeline, run.path("timeline.png"), f"Memory of the first {TRACED_STEPS} steps: {what}"
            )
            roofline.plot(works, ceilings, run.path("roofline.png"), f"Roofline: {what}")
            print(f"{what}\n\n{memory_table(state, measured, formula)}")
            print(f"\n{phase_table(works, phases_ms['step'], least_bytes(model.config, args, ctx))}\n")
            for name, (verdict, evidence) in verdicts.items():
                print(f"{name:<14}{verdict}: {evidence}")
            if ctx.world_size > 1:
                print(f"{'':14}communication also contains the wait for the slowest of {ctx.world_size} ranks")
            print(f"\nThe operators that took longest in the {TRACED_STEPS} traced steps\n{table[0]}")
        ctx.barrier("report written")

    totals = [sum(getattr(row, name) for row in state.values()) for name in ("parameters", "gradients", "optimizer")]
    activations, expected = sum(measured.values()), sum(formula.values())
    return {
        "preset": args.preset,
        "dtype": str(dtype).removeprefix("torch."),
        "world_size": ctx.world_size,
        "parameters": lm.parameter_count(model.config),
        "params_mib": totals[0] / MIB,
        "grads_mib": totals[1] / MIB,
        "optimizer_mib": totals[2] / MIB,
        "activations_measured_mib": activations / MIB,
        "activations_formula_mib": expected / MIB,
        "activations_ratio": activations / expected,
        "timeline_peak_mib": max(total for _, total in timeline.points) / MIB,
        "timeline_source": timeline.source,
        "peak_mem_gib": used.peak_gib,
        "memory_source": used.source,
        "matmul_tflop_per_s": ceilings.flops / 1e12,
        "mem_gib_per_s": ceilings.memory / 2**30,
        "allreduce_gib_per_s": ceilings.network and ceilings.network / 2**30,
        **{f"{name}_ms": value for name, value in phases_ms.items()},
        "verdicts": {name: verdict for name, (verdict, _) in verdicts.items()},
        "bottleneck_phase": max(works, key=lambda work: work.seconds).name,
        "tokens_per_s": args.batch_size * args.seq_len * ctx.world_size / phases_ms["step"] * 1e3,
        "loss_last": loss_last,
        "trace_events": trace_events,
    }


def works_of(
    config: object,
    args: argparse.Namespace,
    ctx: dist.Context,
    phases_ms: dict[str, float],
    traffic: dict[str, roofline.Traffic],
) -> list[Work]:
    """What each phase did and how long it took. Bytes: of forward and backward as the operators move them, of the
    optimizer by formula (its one fused kernel reads and writes each tensor once), of communication on the wire."""
    flops = roofline.training_flops(config, args.batch_size, args.seq_len)
    moved = {name: traffic[name].bytes for name in ("forward", "backward")} | {
        "optimizer": 40 * lm.parameter_count(config)
    }
    works = [Work(name, phases_ms[name] / 1e3, flops[name], moved[name]) for name in flops]
    if ctx.world_size > 1:
        size = 4 * lm.parameter_count(config)
        # beside the all_reduce the phase packs the gradients, divides and unpacks: each reads and writes all of them
        wire, moved_here = roofline.wire_bytes(size, ctx.world_size), 6 * size
        works.insert(2, Work("communication", phases_ms["communication"] / 1e3, moved=moved_here, wire=wire))
    return works


def least_bytes(config: object, args: argparse.Namespace, ctx: dist.Context) -> dict[str, float]:
    dtype = training.compute_dtype(args.dtype, ctx.device)
    return roofline.training_bytes(config, args.batch_size, args.seq_len, dtype)


def memory_table(state: dict[str, memory.State], measured: dict[str, int], formula: dict[str, int]) -> str:
    """MiB by kind of module, the totals, and how far the formula is from what was measured."""
    head = ("parameters", "gradients", "optimizer", "activations", "by formula")
    lines = [f"{'MiB':<12}" + "".join(f"{name:>13}" for name in head) + f"{'ratio':>8}"]
    rows = []
    for kind in KINDS:
        row = state.get(kind, memory.State())
        sizes = [row.parameters, row.gradients, row.optimizer, measured.get(kind, 0), formula.get(kind, 0)]
        if any(sizes):
            rows.append((kind, sizes))
    rows.append(("all", [sum(column) for column in zip(*(sizes for _, sizes in rows), strict=True)]))
    for kind, sizes in rows:
        ratio = f"{sizes[3] / sizes[4]:>8.3f}" if sizes[4] else f"{'-':>8}"
        lines.append(f"{kind:<12}" + "".join(f"{size / MIB:>13.3f}" for size in sizes) + ratio)
    lines.append(
        "activations: saved for backward, measured; ratio: measured / formula; a tied weight counts as embedding"
    )
    return "\n".join(lines)


def phase_table(works: list[Work], step_ms: float, least: dict[str, float]) -> str:
    """FLOPs by formula, bytes as moved and the least possible, time and rates of each phase."""
    lines = [
        f"{'phase':<14}{'ms':>9}{'share':>8}{'GFLOP':>10}{'MiB moved':>12}{'MiB least':>12}{'TFLOP/s':>10}{'GiB/s':>9}"
    ]
    for work in works:
        moved, seconds = work.moved, work.seconds
        lines.append(
            f"{work.name:<14}{seconds * 1e3:>9.2f}{seconds * 1e3 / step_ms:>8.0%}{work.flops / 1e9:>10.3f}"
            f"{moved / MIB:>12.1f}{least.get(work.name, moved) / MIB:>12.1f}{work.flops / seconds / 1e12:>10.4f}"
            f"{moved / seconds / 2**30:>9.2f}"
        )
    lines.append(
        "moved: what eager operators read and write, each by itself; least: if all between two matmuls were fused"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    script.run(main)

"""All layouts of a job, the best of each kind of strategy, and why one wins and the others lose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from common.script import UserError

from .cost import Plan, gib, plan
from .job import RECOMPUTE, ZERO, Job, Layout, micro_batches, refuse

# Predictions this close are equal: then the simpler strategy wins.
EQUAL = 0.03
# Context parallelism is for sequences that one GPU cannot hold: each rank keeps as many tokens as in Llama 3's stage of
# long context, 131,072 / 16 (arXiv:2407.21783, table 4).
CP_TOKENS = 8192
# Beyond this share of the memory one bad allocation ends the run: where the time is equal, room counts.
ROOMY = 0.9
PARTS = {
    "compute": "stages of unequal work", "recompute": "recomputation", "tp": "tensor-parallel communication",
    "cp": "context-parallel communication", "pp": "sending between stages", "bubble": "pipeline bubble",
    "dp": "data-parallel communication not hidden", "replicated": "norms made on every tensor-parallel rank",
}  # fmt: skip
# One kind of parallelism over all GPUs: these are always answered.
SIMPLE = (*ZERO, "TP", "TP over nodes", "TP + SP", "TP + SP over nodes", "CP", "PP")


@dataclass(frozen=True)
class Row:
    """The best layout of one kind of strategy; `plan` is None where no such layout can be."""

    kind: str
    plan: Plan | None
    why: str


@dataclass(frozen=True)
class Advice:
    winner: Plan
    rows: list[Row]  # ranked: what fits by time, then what does not by memory, then what cannot be
    considered: int
    explanation: str


def kind_of(layout: Layout, gpus_per_node: int) -> str:
    """The strategy's name: ZeRO-3 (FSDP) + TP + SP + PP. CP alone shards over its ranks as DP does."""
    parts = [ZERO[layout.zero]] if layout.dp > 1 or layout.zero else []
    if layout.tp > 1:
        parts.append(("TP + SP" if layout.sp else "TP") + " over nodes" * (layout.tp > gpus_per_node))
    parts += [name for name, degree in (("CP", layout.cp), ("PP", layout.pp)) if degree > 1]
    return " + ".join(parts) or "one GPU"


def powers(limit: int) -> list[int]:
    """1, 2, 4 ... up to `limit`."""
    return [2**n for n in range(limit.bit_length())]


def degrees(job: Job) -> Iterator[Layout]:
    """Every split of the GPUs into dp x tp x pp x cp, with every ZeRO stage, TP without and with sequence parallelism;
    tp goes to twice a node to show why not.

    tp, pp and cp are powers of two, dp is what is left. cp leaves each rank CP_TOKENS of a sequence.
    """
    gpus, per_node = job.cluster.gpus, job.cluster.gpus_per_node
    for tp in powers(min(gpus, 2 * per_node)):
        for pp in powers(min(gpus // tp, job.shape.num_hidden_layers)):
            for cp in powers(max(1, job.seq_len // CP_TOKENS)):
                if gpus % (tp * pp * cp) == 0:
                    dp = gpus // (tp * pp * cp)
                    for zero, sp in product(range(4) if dp * cp > 1 else (0,), (False, True) if tp > 1 else (False,)):
                        yield Layout(dp, tp, pp, cp, zero, sp)


def alone(job: Job) -> list[Layout]:
    """One kind over all GPUs, where `degrees` stops before."""
    gpus = job.cluster.gpus
    return [Layout(tp=gpus), Layout(tp=gpus, sp=True), Layout(pp=gpus), Layout(cp=gpus)] if gpus > 1 else []


def refuse_here(job: Job, layout: Layout) -> str | None:
    """`refuse`, and what could be but makes no sense."""
    if layout.cp > 1 and job.seq_len // layout.cp < CP_TOKENS:
        return f"CP {layout.cp} is for sequences of {layout.cp * CP_TOKENS:,} tokens and more, {CP_TOKENS:,} a rank"
    return refuse(job, layout)


def variants(job: Job, layout: Layout, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> Iterator[Layout]:
    """The layout with every micro-batch size, recomputation and number of pipeline chunks that it allows."""
    for micro_batch in sizes:
        for chunks in (1, 2, 4, 8, 16) if layout.pp > 1 else (1,):
            made = replace(layout, micro_batch=micro_batch, chunks=chunks)
            if refuse(job, made) is None:
                yield from (replace(made, recompute=how) for how in RECOMPUTE)


def best(plans: list[Plan]) -> Plan | None:
    """The fastest that fits; nearly equal ones by their room, by less recomputation, then by time."""
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return None
    limit = (1 + EQUAL) * min(p.step_s for p in fitting)
    return min((p for p in fitting if p.step_s <= limit), key=_simplicity)


def _simplicity(p: Plan) -> tuple[int, bool, int, int, float]:
    layout = p.layout
    kinds = sum(degree > 1 for degree in (layout.tp, layout.pp, layout.cp))
    tight = p.memory_bytes > ROOMY * p.job.cluster.gpu.memory
    return kinds, tight, RECOMPUTE.index(layout.recompute), layout.zero, p.step_s


def rank(job: Job) -> Advice:
    """The winner, and for every kind of strategy its best layout and what is wrong with it.

    Raises:
        UserError: nothing fits; the line says what the leanest layout needs, and from how many GPUs on something fits.
    """
    by_kind: dict[str, list[Plan]] = {}
    refused: dict[str, str] = {}
    for layout in dict.fromkeys([*degrees(job), *alone(job)]):
        kind = kind_of(layout, job.cluster.gpus_per_node)
        why = refuse_here(job, layout)
        made = [] if why else [plan(job, variant) for variant in variants(job, layout)]
        if made:
            by_kind.setdefault(kind, []).extend(made)
        elif kind not in refused:
            refused[kind] = why or "no micro-batch size divides the batch"
    everything = [p for plans in by_kind.values() for p in plans]
    winner = best(everything)
    if winner is None:
        raise UserError(_nothing_fits(job, everything, refused))

    rows = []
    for kind, plans in by_kind.items():
        chosen = winner if winner in plans else best(plans) or min(plans, key=lambda p: p.memory_bytes)
        rows.append(Row(kind, chosen, "the winner" if chosen is winner else why_not(chosen, winner)))
    rows.sort(key=lambda row: _order(row, winner))
    rows += [Row(kind, None, why) for kind, why in refused.items() if kind not in by_kind]
    return Advice(winner, rows, len(everything), explain(winner, rows))


def _order(row: Row, winner: Plan) -> tuple[bool, bool, float]:
    assert row.plan is not None
    fits = row.plan.fits
    return row.plan is not winner, not fits, row.plan.step_s if fits else row.plan.memory_bytes


def why_not(loser: Plan, winner: Plan) -> str:
    """One line: what is wrong with a plan, beside the winner."""
    capacity = loser.job.cluster.gpu.memory
    if not loser.fits:
        part = max(loser.memory, key=lambda name: loser.memory[name])
        return (
            f"does not fit: needs {gib(loser.memory_bytes)} GiB of {gib(capacity)} ({part} {gib(loser.memory[part])})"
        )
    ratio = loser.step_s / winner.step_s
    if ratio <= 1 + EQUAL:
        return f"as fast ({ratio:.2f}×), but {_less_simple(loser, winner)}"
    part = max(PARTS, key=lambda name: loser.seconds[name] - winner.seconds[name])
    lost = loser.seconds[part] - (winner.seconds[part] if part == "compute" else 0.0)
    why = f"{ratio:.2f}× the time: {PARTS[part]} {lost / loser.step_s:.0%} of the step"
    if loser.layout.tp > loser.job.cluster.gpus_per_node:
        why += (
            f"; TP {loser.layout.tp} crosses nodes, its collectives take {_crossing(loser):.1f}× as long as inside one"
        )
    return why


def _less_simple(loser: Plan, winner: Plan) -> str:
    """In what a plan of the same speed is behind, in the order of `_simplicity`."""
    capacity = loser.job.cluster.gpu.memory
    said = (
        "more kinds of parallelism",
        f"only {gib(capacity - loser.memory_bytes)} GiB are free",
        f"has to recompute ({loser.layout.recompute})",
        "shards more than it must",
        "not faster",
    )
    pairs = zip(_simplicity(loser), _simplicity(winner), said, strict=True)
    return next((text for mine, best, text in pairs if mine > best), said[-1])


def _crossing(loser: Plan) -> float:
    """Time of a tensor-parallel collective over nodes, in that of one inside a node."""
    cluster, layout = loser.job.cluster, loser.layout
    size = layout.micro_batch * loser.job.seq_len / layout.cp * loser.job.shape.hidden_size * 2
    inside = min(layout.tp, cluster.gpus_per_node)
    across = cluster.gather(layout.tp, cluster.per_node(layout.tp, 1)).time_s(size)
    return across / cluster.gather(inside, inside).time_s(size) if inside > 1 else math.inf


def _nothing_fits(job: Job, plans: list[Plan], refused: dict[str, str]) -> str:
    if not plans:
        return (
            f"no layout of {job.cluster.gpus} GPUs can be ({next(iter(refused.values()))}); change --gpus or the batch"
        )
    leanest = min(plans, key=lambda p: p.memory_bytes)
    need = f"{gib(leanest.memory_bytes)} GiB of {gib(job.cluster.gpu.memory)} a GPU"
    gpus = job.cluster.gpus
    while (gpus := 2 * gpus) <= 2**16:
        nodes = max(job.cluster.gpus_per_node, min(8, gpus))
        larger = replace(job, cluster=replace(job.cluster, gpus=gpus, gpus_per_node=nodes))
        found = (plan(larger, v) for layout in degrees(larger) for v in variants(larger, layout))
        if any(p.fits for p in found):
            return f"nothing fits: the leanest layout, {leanest.layout}, needs {need}; take at least {gpus} GPUs"
    return f"nothing fits: the leanest layout, {leanest.layout}, needs {need}; take larger GPUs or shorter sequences"


def explain(winner: Plan, rows: list[Row]) -> str:
    """The winner in plain words."""
    job, layout, seconds = winner.job, winner.layout, winner.seconds
    m, precision = micro_batches(job, layout), job.precision
    held = sum(winner.memory[name] for name in ("weights", "gradients", "optimizer"))
    whole = (precision.weights + precision.gradients + precision.optimizer) * job.shape.parameters
    lines = [
        f"{layout}: {job.shape.parameters / 1e9:.3g} B parameters make {gib(whole)} GiB of weights, gradients and "
        f"optimizer, of which a GPU holds {gib(held)}; with activations (recomputation: {layout.recompute}), logits "
        f"and buffers it uses {gib(winner.memory_bytes)} of {gib(job.cluster.gpu.memory)} GiB.",
    ]
    sharded = {0: "nothing", 1: "the optimizer", 2: "optimizer and gradients", 3: "optimizer, gradients and weights"}
    if layout.dp * layout.cp > 1:
        of_cp = f" ({layout.dp} × CP {layout.cp})" if layout.cp > 1 else ""
        lines.append(
            f"Data parallelism over {layout.dp * layout.cp} ranks{of_cp}, sharding {sharded[layout.zero]}; {m} "
            f"micro-batches of {layout.micro_batch} a step. Of its communication {seconds['dp'] / winner.step_s:.1%} "
            "of the step is not hidden behind compute."
        )
    if layout.tp > 1:
        where = "stays inside a node" if layout.tp <= job.cluster.gpus_per_node else "crosses nodes"
        waits = f"{seconds['tp'] / winner.step_s:.0%} of the step"
        lines.append(f"TP {layout.tp} {where}: each layer waits for it, {waits}.")
    if layout.sp:
        lines.append(f"SP shares the norms out too: {layout.tp} times less of them to make and to keep.")
    if layout.pp > 1:
        lines.append(
            f"PP {layout.pp} sends only activations to the next stage; {layout.chunks} stages a GPU and {m} "
            f"micro-batches leave a bubble of {winner.bubble:.0%}."
        )
    if layout.cp > 1:
        lines.append(f"CP {layout.cp} leaves {job.seq_len // layout.cp:,} of {job.seq_len:,} tokens on a GPU.")
    simple = [row for row in rows if row.plan is not None and not row.plan.fits and row.kind in SIMPLE]
    if simple:
        lines.append("Simpler ones: " + "; ".join(f"{row.kind} {row.why}" for row in simple) + ".")
    return " ".join(lines)

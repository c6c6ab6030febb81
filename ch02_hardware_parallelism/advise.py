"""Which parallelism for this model on this cluster? Every layout costed, the best one explained, the others answered.

You learn   what DP, ZeRO-1/2/3 (FSDP), TP without and with sequence parallelism (SP), PP and CP take in memory, on the
            wire and in time, and when to use which
Laptop      python ch02_hardware_parallelism/advise.py --model llama-8b --gpus 8 --global-batch 16
            python ch02_hardware_parallelism/advise.py --model llama-405b --gpus 8192 --global-batch-tokens 16777216
            python ch02_hardware_parallelism/advise.py --model nano --gpu cpu-measured --gpus 2 --seq-len 128
GPU node    python ch02_hardware_parallelism/advise.py --detect --model llama-8b         (this node's GPUs, links, NICs)
Cluster     the same on one node, with --gpus for all of them: --detect --gpus 64
You see     a ranked table, one row a strategy: its best layout, memory, bytes sent, step time, MFU, and why it loses;
            the winner in plain words; memory.png. A prediction: check_adviser.py shows how far off it is
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from ch01_intro import topology
from ch01_intro.topology.network import node_gbps
from ch02_hardware_parallelism.layout import FP32, GPUS, MIXED, Advice, Cluster, Job, find_shape, rank
from ch02_hardware_parallelism.layout.cluster import GIB, LINK_EFFICIENCY
from ch02_hardware_parallelism.layout.cost import as_json, gib
from ch02_hardware_parallelism.layout.draw import draw
from ch02_hardware_parallelism.layout.search import SIMPLE
from ch02_hardware_parallelism.links import nvlink_gb_per_s, pcie_gb_per_s
from common import dist, process, script
from common.script import UserError

WIDTH = 42  # of a layout's name in the table
MEASURED_RANKS = 2
CHECK = (
    f"torchrun --standalone --nproc-per-node={MEASURED_RANKS} ch02_hardware_parallelism/check_adviser.py --device cpu"
)


def detected(folder: Path | None) -> tuple[str, int, float, float]:
    """(name in GPUS, GPUs of the node, bytes/s of a GPU inside the node, and between nodes) of a machine's topology.

    Raises:
        UserError: no GPU, or one whose data the table does not have.
    """
    machine = topology.detect(folder)
    if not machine.gpus:
        raise UserError("no GPU was detected; name the cluster with --gpu and --gpus, or pass --gpu cpu-measured")
    first = machine.gpus[0]
    model, memory = first.name or "unknown", first.memory_mib or 0
    family = next((part for part in ("H200", "H100", "A100") if part in model), "")
    name = {
        "H200": "h200",
        "H100": "h100-96g" if memory > 90_000 else "h100-80g",
        "A100": "a100-40g" if memory < 50_000 else "a100-80g",
    }.get(family)
    if name is None:
        raise UserError(f"no figures for a GPU {model!r}; pass the closest of {', '.join(GPUS)} with --gpu")
    links = min((topology.nvlinks(kind) for kind in machine.gpu_links().values()), default=0)
    intra = nvlink_gb_per_s(model, links) or pcie_gb_per_s(4, 16) or 0.0  # where NVLink does not join all pairs
    gbps = node_gbps(machine)
    inter = gbps * 1e9 / 8 / len(machine.gpus) if gbps else GPUS[name].inter
    return name, len(machine.gpus), intra * 1e9, inter


def measured_cpu() -> Cluster:
    """This machine's cores as a cluster of two ranks, measured by check_adviser.py."""
    done = process.run(CHECK, timeout_s=180)
    if done.result is None:
        raise UserError(f"the measurement failed ({done.reason()}); try it by itself: {CHECK}")
    return Cluster.measured(done.result)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument(
        "--model", default="llama-8b", help="llama-8b, -70b, -405b, a preset, or a folder with a config"
    )
    parser.add_argument("--gpu", choices=(*GPUS, "cpu-measured"), help="default: h100-80g, or what --detect finds")
    parser.add_argument("--gpus", type=script.at_least(1), help="of the whole cluster; default: 16, or the node's")
    parser.add_argument("--gpus-per-node", type=script.at_least(1), help="default: 8, or what --detect finds")
    parser.add_argument(
        "--detect", nargs="?", type=Path, const=None, default=False, metavar="DIR",
        help="take GPU, links and NICs of this node, or of one recorded into DIR (ch01_intro/detect_topology.py)",
    )  # fmt: skip
    parser.add_argument("--seq-len", type=script.at_least(2), default=8192)
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--global-batch", type=script.at_least(1), help="sequences of a step, over all ranks")
    batch.add_argument("--global-batch-tokens", type=script.at_least(1), help="default: 2^20, at least 4 sequences")
    parser.add_argument("--intra-bandwidth", type=script.positive, help="GB/s of a GPU inside the node, one direction")
    parser.add_argument("--inter-bandwidth", type=script.positive, help="GB/s of a GPU between nodes, one direction")
    parser.add_argument("--efficiency", type=script.positive, help="share of the peak that compute sustains, up to 1")
    parser.add_argument("--rows", type=script.at_least(1), default=12, help="of the table")
    parser.add_argument("--json", action="store_true", help="print every row with all its figures as JSON instead")
    return parser.parse_args(argv)


def build_job(args: argparse.Namespace) -> Job:
    """The job that the flags describe; bad input is found before anything is measured."""
    shape = find_shape(args.model)
    tokens = args.global_batch_tokens or max(2**20, 4 * args.seq_len)
    batch = args.global_batch or tokens // args.seq_len
    if batch < 1:
        raise UserError(
            f"a batch of {tokens} tokens is less than one sequence of {args.seq_len}; raise --global-batch-tokens"
        )
    if args.efficiency and args.efficiency > 1:
        raise UserError(f"an efficiency of {args.efficiency:g} is above 1; pass the share of the peak, such as 0.46")
    if args.gpu == "cpu-measured":
        asked = {args.gpus, args.gpus_per_node} - {None, MEASURED_RANKS}
        if asked or args.detect is not False:
            raise UserError(
                f"--gpu cpu-measured is {MEASURED_RANKS} ranks on this machine, and says nothing of others; leave out "
                "--gpus, --gpus-per-node and --detect"
            )
        args.gpus = args.gpus_per_node = MEASURED_RANKS
    name, per_node, gpus = args.gpu or "h100-80g", args.gpus_per_node or 8, args.gpus or 16
    intra = inter = None
    if args.detect is not False:
        found, node, intra, inter = detected(args.detect)
        name, per_node, gpus = args.gpu or found, args.gpus_per_node or node, args.gpus or node
    if gpus > per_node and gpus % per_node:
        raise UserError(f"{gpus} GPUs do not fill nodes of {per_node}; pass a multiple, or another --gpus-per-node")
    cluster = measured_cpu() if name == "cpu-measured" else Cluster.of(name, gpus, per_node)
    rates = {
        "intra": args.intra_bandwidth * 1e9 if args.intra_bandwidth else intra,
        "inter": args.inter_bandwidth * 1e9 if args.inter_bandwidth else inter,
        "efficiency": args.efficiency,
    }
    gpu = replace(cluster.gpu, **{key: value for key, value in rates.items() if value})
    precision = FP32 if name == "cpu-measured" else MIXED
    return Job(shape, replace(cluster, gpu=gpu), args.seq_len, batch, precision)


def show(advice: Advice, job: Job, most: int) -> None:
    cluster, gpu = job.cluster, job.cluster.gpu
    print(
        f"{job.shape.name}: {job.shape.parameters / 1e9:.3g} B parameters on {cluster.gpus} GPUs, "
        f"{cluster.gpus_per_node} a node; {job.batch} sequences of {job.seq_len:,} tokens a step\n"
        f"a GPU: {gpu.peak / 1e12:.3g} TFLOP/s × {gpu.efficiency:.2f} sustained, {gib(gpu.memory)} GiB, "
        f"{gpu.intra / 1e9:.3g} GB/s in the node, {gpu.inter / 1e9:.3g} GB/s between nodes; of a link "
        f"{LINK_EFFICIENCY:.0%} is reached\n{advice.considered:,} layouts considered; the best of each strategy:\n"
    )
    print(f"{'layout':{WIDTH}} micro  chunks  recompute     GiB  sent GiB    step s    MFU  why")
    possible = [row for row in advice.rows if row.plan is not None]
    simple = [row for row in possible[most:] if row.kind in SIMPLE]
    for row in possible[:most] + simple:
        made, layout = row.plan, row.plan.layout
        mfu = f"{made.mfu:6.1%}" if made.fits else f"{'-':>6}"
        print(
            f"{layout!s:{WIDTH}} {layout.micro_batch:5} {layout.chunks:7}  {layout.recompute:9} "
            f"{gib(made.memory_bytes):>7} {gib(sum(made.wire.values())):>9} {made.step_s:9.3g} {mfu}  {row.why}"
        )
    if left := len(possible) - min(most, len(possible)) - len(simple):
        print(f"... and {left} more strategies (--rows)")
    impossible: dict[str, list[str]] = defaultdict(list)
    for row in advice.rows:
        if row.plan is None:
            impossible[row.why].append(row.kind)
    for why, kinds in impossible.items():
        rest = f" and {len(kinds) - 4} with more" if len(kinds) > 4 else ""
        print(f"not possible: {', '.join(kinds[:4])}{rest}: {why}")
    print(f"\n{advice.explanation}\n")


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if dist.read_launch().launcher != "python":
        raise script.UserError("the adviser is one process; start it with plain python")
    job = build_job(args)
    advice = rank(job)
    run = script.start(__file__, args)
    rows = [
        {"strategy": row.kind, "why": row.why, **({"plan": as_json(row.plan)} if row.plan else {})}
        for row in advice.rows
    ]
    with script.atomic_write(run.path("advice.json")) as file:
        json.dump(rows, file, indent=2)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show(advice, job, args.rows)
    title = f"{job.shape.name} on {job.cluster.gpus} GPUs, {job.batch} × {job.seq_len:,} tokens a step (predicted)"
    draw(advice, run.path("memory.png"), title)
    best = as_json(advice.winner)
    return {
        "model": job.shape.name,
        "parameters": job.shape.parameters,
        "gpus": job.cluster.gpus,
        "winner": str(advice.winner.layout),
        **{key: best[key] for key in ("dp", "tp", "sp", "pp", "cp", "zero", "recompute", "micro_batch", "chunks")},
        **{key: best[key] for key in ("memory_gib", "step_s", "mfu", "tokens_per_s_gpu", "bubble")},
        "capacity_gib": job.cluster.gpu.memory / GIB,
        "considered": advice.considered,
        "strategies_fit": sum(row.plan is not None and row.plan.fits for row in advice.rows),
        "strategies_lose": sum(row.plan is not advice.winner for row in advice.rows),
    }


if __name__ == "__main__":
    script.run(main)

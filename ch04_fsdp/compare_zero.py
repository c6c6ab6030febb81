"""FSDP, DDP and DeepSpeed's ZeRO 1, 2 and 3 on one model in one run: the same step, then memory, speed, bytes, saving.

You learn   what each stage of sharding saves and costs, counted, weighed and timed; how to compare engines fairly:
            prove that they compute the same, take turns, and build one of them twice to see what is noise
Laptop      torchrun --standalone --nproc-per-node=2 ch04_fsdp/compare_zero.py --width 384 --layers 6
GPU node    torchrun --standalone --nproc-per-node=gpu ch04_fsdp/compare_zero.py --preset small --batch-size 16 \
                --seq-len 1024 --dtype bf16
Cluster     srun python ch04_fsdp/compare_zero.py --preset 1b --layers 4 --seq-len 1024 --dtype bf16 --save-to DIR
You see     the gradients of all equal to rounding; what a rank holds beside the ideal 1/N; tokens/s in turns, above 1
            FSDP in full is faster; FSDP in full, ZeRO-1 and ZeRO-2 sending half as much again as DDP

1. Weighed: each contestant trains alone in processes of its own, so that no peak holds another's memory. On a CPU it is
   the resident set over that of a tiny model's training before, with an allocator that returns what is freed.
2. Equal: one step on ragged rows; loss, norm, each gradient and the weights after it are compared with DDP's.
3. Counted: the collectives of a step, and what a rank sends for them at least; beside it the formula.
4. Timed: all are alive and take turns in an order drawn anew each round, and are built anew for each start. On a CPU
   freed memory is kept, as CUDA's allocator keeps it.
5. Saved: weights and optimizer, until all is on the disk.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch02_hardware_parallelism.training import timed_ms
from ch03_ddp.feed import Documents, Feed, StepBatch
from ch04_fsdp import compare_report, contestants, resident
from ch04_fsdp.compare_report import CONTROL, REFERENCE
from ch04_fsdp.contestants import Contestant, Job
from ch04_fsdp.traffic import Collective, Traffic
from common import data, dist, lm, process, profiling, ranks, script
from common.logs import Progress

WARM_UP = 2  # steps of each start


# ---------------------------------------------------------------- 1. weighed


def weigh(name: str, job: Job, batch: StepBatch) -> dict[str, int]:
    """Bytes of this rank over those of a tiny model's training: held by kind and in all, and the peak of a step."""
    device = job.ctx.device
    tiny = narrowed(copy.deepcopy(job.config), 64)
    tiny.num_hidden_layers = 1
    first = contestants.build(name, dataclasses.replace(job, config=tiny))
    for _ in range(WARM_UP):  # whatever is loaded or set up at first use
        contestants.train(first, batch)
    first.close()
    before = profiling.memory(device).current
    contestant = contestants.build(name, job)
    for _ in range(WARM_UP):
        contestants.train(contestant, batch)
    profiling.reset_peak_memory(device)
    contestant.backward(batch)
    held = contestants.held_bytes(contestant)
    resident = profiling.memory(device).current - before
    contestant.update()
    return held | {"resident": resident, "peak": profiling.memory(device).peak - before}


def weigh_alone(name: str, args: argparse.Namespace, ctx: dist.Context, folder: Path) -> dict[str, Any]:
    """The same by ranks of its own, which this script starts: one beside each of ours. Known on rank 0.

    Raises:
        UserError: it failed there; the line says why.
    """
    port = ctx.exchange("port", str(ranks.free_port()))[0]
    launch = ctx.launch
    variables = {
        "RANK": str(launch.rank), "LOCAL_RANK": str(launch.local_rank), "WORLD_SIZE": str(launch.world_size),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size), "MASTER_ADDR": launch.address, "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "False", "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # fmt: skip
    command = [sys.executable, __file__, *args.argv, "--only", name, "--run-dir", str(folder / f"alone-{name}")]
    done = process.run(command, timeout_s=args.timeout_s, env=variables)
    failed = "" if done.returncode == 0 else done.reason(args.timeout_s)
    if failed := next(filter(None, ctx.exchange("weighed", failed)), ""):
        raise script.UserError(f"{name} alone failed ({failed}); run it by itself with --only {name}")
    return done.result or {}


# ---------------------------------------------------------------- 2. equal


def whole_step(contestant: Contestant, batch: StepBatch) -> dict[str, Any]:
    loss = contestant.backward(batch)
    torch.distributed.all_reduce(loss)
    gradients = {name: x.float().clone() for name, x in contestant.gradients()}
    norm = contestant.update()
    return {
        "loss": float(loss), "norm": float(norm), "gradients": gradients,
        "weights": {name: x.float().clone() for name, x in contestant.weights()},
    }  # fmt: skip


def differences(did: dict[str, Any], reference: dict[str, Any], start: dict[str, torch.Tensor]) -> dict[str, float]:
    """From the reference's step: relative, as compare_report.TOLERANCE says. inf where a gradient is missing."""
    if did["gradients"].keys() != reference["gradients"].keys():
        return dict.fromkeys(("loss", "norm", "gradients", "step"), float("inf"))
    weights = reference["weights"]
    apart = sum(float((did["weights"][n] - w).square().sum()) for n, w in weights.items())
    length = sum(float((w - start[n]).square().sum()) for n, w in weights.items())
    return {
        **{what: abs(did[what] / reference[what] - 1) for what in ("loss", "norm")},
        "gradients": max(
            float((did["gradients"][n] - g).abs().max() / g.abs().max()) for n, g in reference["gradients"].items()
        ),
        "step": (apart / length) ** 0.5,
    }


def compare(built: dict[str, Contestant], batch: StepBatch) -> dict[str, dict[str, float]]:
    """One step of each from the same weights. How far each is from DDP."""
    start = {name: x.clone() for name, x in built[REFERENCE].weights()}
    reference = whole_step(built[REFERENCE], batch)
    found = {}
    for name, one in built.items():  # one after another: each has a whole model's gradients and weights for a moment
        if name not in (REFERENCE, CONTROL):
            found[name] = differences(whole_step(one, batch), reference, start)
    return found


# ---------------------------------------------------------------- 5. saved


def save(contestant: Contestant, folder: Path, ctx: dist.Context) -> dict[str, float]:
    """Seconds until the checkpoint is on the disk, and its size. `folder` is one that all ranks see."""
    ctx.barrier("save")
    begin = time.perf_counter()
    contestant.save(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files[ctx.rank :: ctx.world_size]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    ctx.barrier("saved")
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    ctx.barrier("save weighed")  # rank 0 removes the folder
    return {"save_s": seconds, "save_mib": size / 2**20}


# ---------------------------------------------------------------- the run


def count(contestant: Contestant, batch: StepBatch) -> list[Collective]:
    """The collectives of a step."""
    with Traffic() as traffic:
        contestants.train(contestant, batch)
    return traffic.seen


def measure(args: argparse.Namespace, job: Job, feeds: tuple[Feed, Feed], run: script.Run) -> dict[str, Any]:
    ctx, (ragged, blocks) = job.ctx, feeds
    names = list(dict.fromkeys([REFERENCE, *args.contestants]))
    weighed = {name: weigh_alone(name, args, ctx, run.folder) for name in names}
    everyone = [*names, CONTROL] if "fsdp-full" in names else names
    order = random.Random(args.seed)  # the same on all ranks
    first, batch = next(ragged), next(blocks)
    times_ms: list[dict[str, list[float]]] = []  # by start, contestant and round
    progress = Progress(args.starts * args.rounds, "rounds")
    for start in range(args.starts):
        built = {n: contestants.build(n.removesuffix("-again"), job) for n in order.sample(everyone, len(everyone))}
        if start == 0:
            apart = compare(built, first)
            sent = {name: count(built[name], batch) for name in names}
        for one in built.values():
            for _ in range(WARM_UP):
                contestants.train(one, batch)
        times_ms.append({name: [] for name in everyone})
        for number in range(args.rounds):
            batch = next(blocks)
            for name in order.sample(everyone, len(everyone)):
                step = partial(contestants.train, built[name], batch)
                times_ms[-1][name].append(timed_ms(step, ctx.device))
            progress.update(start * args.rounds + number + 1)
        if start == args.starts - 1:
            with tempfile.TemporaryDirectory(dir=args.save_to) as own:
                root = Path(ctx.exchange("save to", own)[0])  # rank 0's
                saved = {}
                for name in names:
                    (root / name).mkdir(exist_ok=True)
                    saved[name] = save(built[name], root / name, ctx)
        for one in built.values():
            one.close()
    if not ctx.is_main:  # it alone knows what was weighed
        return {}
    parameters = lm.parameter_count(job.config)
    figures = {name: compare_report.of(name, parameters, job, weighed[name], sent[name], saved[name]) for name in names}
    return compare_report.result(figures, times_ms, apart, job, batch.tokens)


def shape(args: argparse.Namespace) -> Any:
    """The preset's config, narrower, wider, shallower or deeper when asked.

    Raises:
        UserError: the width does not divide into heads of 64.
    """
    config = lm.config(args.preset, args.seq_len)
    if args.width:
        if args.width % 64:
            raise script.UserError(f"--width {args.width} is not a multiple of 64, the size of a head; take one")
        narrowed(config, args.width)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    return config


def narrowed(config: Any, width: int) -> Any:
    """The config changed to another width, with heads of 64."""
    config.hidden_size, config.intermediate_size, config.head_dim = width, width * 11 // 4, 64
    config.num_attention_heads = config.num_key_value_heads = width // 64
    return config


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    names = ", ".join(contestants.NAMES)
    parser.add_argument("--contestants", type=script.comma_list(str), default=list(contestants.NAMES), help=names)
    parser.add_argument("--only", help="weigh this one alone, and nothing else")
    parser.add_argument("--starts", type=script.at_least(1), default=2, help="build all anew so many times")
    parser.add_argument("--rounds", type=script.at_least(1), default=5, help="of each start")
    parser.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, or a model folder")
    parser.add_argument("--width", type=script.at_least(64), help="in place of the preset's")
    parser.add_argument("--layers", type=script.at_least(1), help="in place of the preset's")
    parser.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, or a hub data set id")
    parser.add_argument("--batch-size", type=script.at_least(1), default=2, help="sequences a rank and micro-batch")
    parser.add_argument("--accumulation", type=script.at_least(1), default=1, help="micro-batches a step")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--lr", type=script.positive, default=1e-3)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the matrix products")
    parser.add_argument("--save-to", type=Path, help="write checkpoints there for a moment: a folder that all ranks "
                        "see (default: the host's for temporary files)")  # fmt: skip
    parser.add_argument("--threads", type=script.at_least(1), help="CPU threads a rank (default: cores / local ranks)")
    parser.add_argument("--timeout-s", type=script.positive, default=300, help="for one contestant alone")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    contestants.check([*args.contestants, *([args.only] if args.only else [])])
    if args.save_to and not args.save_to.is_dir():
        raise script.UserError(f"there is no folder {args.save_to}; make it, or leave out --save-to")
    shape(args)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    run = script.start(__file__, args)
    corpus = training.load_corpus(args)
    with dist.session(args.device, threads=args.threads) as ctx:
        if args.save_to is None and ctx.launch.local_world_size < ctx.world_size:
            raise script.UserError("several hosts save to a folder that all of them see; pass --save-to")
        if ctx.world_size < 2:
            raise script.UserError("one rank has nothing to share out; start it with torchrun --nproc-per-node=2")
        job = Job(
            shape(args), ctx, args.batch_size, args.accumulation, lr=args.lr, dtype=training.DTYPES[args.dtype],
            seed=args.seed,
        )  # fmt: skip
        sequences = args.batch_size * args.accumulation * ctx.world_size
        documents = Documents(corpus.train, corpus.tokenizer().eos_token_id, args.seq_len)
        ragged, blocks = (
            Feed(rows, ctx, global_batch=sequences, micro_batch=args.batch_size, seed=args.seed)
            for rows in (documents, data.Blocks(corpus.train, args.seq_len))
        )
        if args.only:
            resident.return_at_once()
            mine = weigh(args.only, job, next(blocks))
            every = ctx.gather(mine)
            return {kind: max(rank[kind] for rank in every) for kind in mine} if ctx.is_main else {}
        resident.return_at_once(False)  # the clock counts: what is freed is used again, as CUDA's allocator does
        result = measure(args, job, (ragged, blocks), run)
        if ctx.is_main:
            compare_report.show(result)
            compare_report.draw(result, run.path("comparison.png"))
            if wrong := compare_report.missed(result):
                raise script.CheckFailed("; ".join(wrong), result)
        return result


if __name__ == "__main__":
    script.run(main)

"""A checkpoint outlives its ranks: saved on 4, killed in a save, resumed on 4, 2 and 1, exported, trained from again.

You learn   why a sharded checkpoint is not bound to the number of ranks that wrote it, what an asynchronous save may
            lose (nothing: it has no name until it is whole), and how the model leaves for Hugging Face and comes back
Laptop      python ch04_fsdp/reshard.py
GPU node    python ch04_fsdp/reshard.py --preset small --seq-len 512 --ranks 8 --other-ranks 4,2
Cluster     the same on one node; launch files resume by themselves
You see     the same weights, bit for bit, after a kill -9 in a save; the same losses to some 1e-6 on fewer ranks and
            under other strategies; one hash for the checkpoint and for the exported folder, and equal logits
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from ch01_intro import checkpoint
from ch03_ddp.survive import Job, choose_device, spoil
from common import lm, script
from common.logs import get_logger
from common.process import run as run_process

log = get_logger()


class ShardedJob(Job):
    script = "ch04_fsdp/train_fsdp.py"


def kill_in_a_save(job: Job, args: argparse.Namespace) -> dict:
    """Killed while the ranks write the third checkpoint, the second spoilt on top: to the end from the first."""
    first, second, third = (f"step-{number * args.save_every:08d}" for number in (1, 2, 3))
    folder = job.out / "checkpoints"
    under_way = folder / f".{third}.partial"
    in_save = job.kill_when(under_way.exists, "the third save", args.ranks, "--async-save") and under_way.exists()
    kept = [path.name for path in checkpoint.every(folder)]
    log.info("killed -9 in a save" if in_save else "the save was quicker", whole_checkpoints=",".join(kept))
    spoil(folder / kept[-1] / "__0_0.distcp")
    ended = job.finish(args.ranks, "--async-save")
    return {
        "killed_in_a_save": in_save,
        "earlier_saves_survived": kept[:2] == [first, second] and (third not in kept) == in_save,
        "spoilt_checkpoint_named": f"{kept[-1]} is corrupt" in job.last_error,
        "weights_sha256": ended["weights_sha256"],
    }


def go_on_elsewhere(alone: Job, folder: Path, args: argparse.Namespace) -> dict:
    """From an early checkpoint, on each other number of ranks and by another strategy: by how much do losses differ?"""
    early = sorted((alone.out / "checkpoints").glob("step-*"))[0]
    wanted, worst = alone.losses(), 0.0
    for ranks, strategy in zip(args.other_ranks, ("grad", "replicate", "full") * len(args.other_ranks), strict=False):
        job = ShardedJob(folder / f"on-{ranks}", args)
        job.finish(ranks, "--resume", str(early), "--strategy", strategy, "--recompute", "block")
        found = job.losses()
        difference = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        print(f"saved on {args.ranks} ranks, went on on {ranks} ({strategy}): losses differ by {difference:.1e}")
        worst = max(worst, difference)
    return {"largest_loss_difference_other_ranks": worst}


@torch.no_grad()
def leave_and_come_back(alone: Job, folder: Path, args: argparse.Namespace) -> dict:
    """Export the newest checkpoint by a process of its own; read it with transformers; and train from it, sharded."""
    newest = checkpoint.every(alone.out / "checkpoints")[-1]
    exported = folder / "exported"
    command = ["python", "ch04_fsdp/export.py", str(newest), str(exported), "--tokenizer", str(alone.out / "model")]
    told = alone._result(run_process([*command, "--file-mib", "4"], timeout_s=args.timeout_s))
    outside, inside = lm.load(str(exported)), lm.load(str(alone.out / "model"))
    tokens = torch.arange(args.seq_len)[None]
    again = ShardedJob(folder / "again", argparse.Namespace(**vars(args) | {"preset": str(exported), "steps": 1}))
    again.finish(args.other_ranks[0], "--lr", "1e-12", "--warmup", "0")
    from_export = lm.load(str(again.out / "model"))
    moved = max((a - b).abs().max().item() for a, b in zip(outside.parameters(), from_export.parameters(), strict=True))
    print(f"exported {told['weights_gib']:.3f} GiB in {told['files']} files, with {told['peak_memory_gib']:.3f} GiB")
    return {
        "export_sha256": lm.weights_sha256(outside),
        "logits_equal": bool(torch.equal(outside(tokens).logits, inside(tokens).logits)),
        "files": told["files"],
        "moved_on_the_way_back": moved,
    }


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=script.at_least(8), default=20)
    parser.add_argument("--save-every", type=script.at_least(1), default=4)
    parser.add_argument("--global-batch", type=script.at_least(1), default=8)
    parser.add_argument("--seq-len", type=script.at_least(2), default=64)
    parser.add_argument("--ranks", type=script.at_least(2), default=4)
    parser.add_argument("--other-ranks", type=script.comma_list(script.at_least(1)), default="2,1")
    parser.add_argument("--timeout-s", type=script.positive, default=300, help="for each part")
    args = parser.parse_args(argv)
    if args.steps < 4 * args.save_every:
        raise script.UserError(f"{args.steps} steps leave no room for four saves; raise --steps")
    for ranks in (args.ranks, *args.other_ranks):
        if args.global_batch % ranks:
            raise script.UserError(f"--global-batch {args.global_batch} does not divide by {ranks} ranks")
    choose_device(args, args.ranks)
    script.start(__file__, args)
    args.dropout, args.dtype = 0.0, "fp32"  # other ranks draw other masks
    folder = Path(tempfile.mkdtemp(prefix="reshard-"))
    try:
        alone = ShardedJob(folder / "alone", args)
        whole = alone.finish(args.ranks, "--keep", "9")
        result = kill_in_a_save(ShardedJob(folder / "killed", args), args)
        result["weights_equal"] = result["weights_sha256"] == whole["weights_sha256"]
        result |= go_on_elsewhere(alone, folder, args)
        result |= leave_and_come_back(alone, folder, args)
        result["export_equal"] = result["export_sha256"] == whole["weights_sha256"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {"ranks": args.ranks, "other_ranks": args.other_ranks, **result}
    must = ("earlier_saves_survived", "spoilt_checkpoint_named", "weights_equal", "export_equal", "logits_equal")
    if wrong := [name for name in must if not result[name]]:
        raise script.CheckFailed(f"not {', not '.join(wrong)}", result)
    return result


if __name__ == "__main__":
    script.run(main)

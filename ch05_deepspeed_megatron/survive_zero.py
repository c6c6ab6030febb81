"""Kill a ZeRO job at random moments and in a save, spoil its newest checkpoint, preempt it: the same end, bit for bit.

You learn   why DeepSpeed's `latest` is no sign of a whole checkpoint, what a resume needs beside engine.load_checkpoint
            (each rank's random state, the position in the data, the losses so far), and how to see that it is exact
Laptop      python ch05_deepspeed_megatron/survive_zero.py
GPU node    python ch05_deepspeed_megatron/survive_zero.py --preset small --seq-len 512 --ranks 8 --dtype bf16
Cluster     the same on one node; launch/deepspeed.sbatch resumes by itself
You see     losses of every step and the hash of the weights equal to those of a run that was left alone, in each stage
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from ch03_ddp.survive import Job, choose_device, spoil
from ch05_deepspeed_megatron import checkpoints, options
from common import script
from common.logs import get_logger
from common.process import Child

log = get_logger()


class ZeroJob(Job):
    script = "ch05_deepspeed_megatron/train_deepspeed.py"

    def __init__(self, out: Path, args: argparse.Namespace, stage: int) -> None:
        super().__init__(out, args)
        self.config = options.CONFIGS / f"zero{stage}.json"

    def words(self, flags: tuple[str, ...]) -> list[str]:
        return [*super().words(flags), "--deepspeed-config", str(self.config)]

    def preempt(self, ranks: int, at: int) -> dict:
        """SIGTERM to the ranks once `at` steps are done, as Slurm sends it. The RESULT."""
        begun, deadline = self.losses_file(), time.monotonic() + self.args.timeout_s
        with Child(self.command(ranks, ())) as child:
            while self.losses_file() == begun or len(self.losses()) < at:
                self._still_there(child, deadline, f"step {at}")
                time.sleep(0.01)
            for process in child.tree():  # not the launcher, which would give them 30 s and then fail
                words = " ".join(process.cmdline())
                if self.script in words and "torchrun" not in words:
                    process.send_signal(signal.SIGTERM)
            done = child.wait(self.args.timeout_s)
        self.last_error = done.stderr
        return self._result(done)


def suffer(job: ZeroJob, args: argparse.Namespace) -> dict:
    """Kills at random steps, one in the third save; the newest whole checkpoint spoilt; SIGTERM; then to the end."""
    moments = sorted(random.Random(args.seed).sample(range(2, 2 * args.save_every), args.kills))
    for moment in moments:
        job.kill_when(lambda at=moment: len(job.losses()) >= at, f"step {moment}", args.ranks)
        log.info("killed -9", after_step=len(job.losses()))
    third = job.out / "checkpoints" / f".step-{3 * args.save_every:08d}.partial"
    in_save = job.kill_when(third.exists, "the third save", args.ranks) and third.exists()
    kept = job.checkpoints()
    log.info("killed -9 in a save" if in_save else "the save was quicker", whole_checkpoints=len(kept))
    spoil(next((kept[-1] / checkpoints.TAG).glob("*zero_pp_rank_1_*optim_states.pt")))
    left = job.preempt(args.ranks, args.steps // 2)
    named = f"{kept[-1].name} is corrupt" in job.last_error
    log.info("told to stop", after_step=left["steps"])
    ended = job.finish(args.ranks)
    return {
        "killed_in_a_save": in_save,
        "spoilt_checkpoint_named": named,
        "resumed_before_the_spoilt": left["resumed_at_step"] < int(kept[-1].name.split("-")[1]),
        "preempted_and_resumed": left["preempted"] and ended["resumed_at_step"] == left["steps"],
        "weights_sha256": ended["weights_sha256"],
    }


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--stages", type=script.comma_list(int), default="3", help="of 1, 2 and 3")
    parser.add_argument("--steps", type=script.at_least(8), default=20)
    parser.add_argument("--save-every", type=script.at_least(2), default=4)
    parser.add_argument("--global-batch", type=script.at_least(1), default=4)
    parser.add_argument("--seq-len", type=script.at_least(2), default=64)
    parser.add_argument("--dropout", type=float, default=0.1, help="needs each rank's random state")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--ranks", type=script.at_least(2), default=2)
    parser.add_argument("--kills", type=script.at_least(0), default=2, help="at random steps; one more comes in a save")
    parser.add_argument("--timeout-s", type=script.positive, default=300, help="for each part of a run")
    args = parser.parse_args(argv)
    if wrong := [stage for stage in args.stages if stage not in (1, 2, 3)]:
        raise script.UserError(f"no ZeRO stage {wrong[0]} here; take 1, 2 or 3")
    if args.steps <= 3 * args.save_every or args.kills > 2 * args.save_every - 2:
        raise script.UserError(f"{args.steps} steps leave no room for a third save and {args.kills} kills; change one")
    if args.global_batch % (2 * args.ranks):
        raise script.UserError(
            f"--global-batch {args.global_batch} is no multiple of {args.ranks} ranks x 2; change it"
        )
    choose_device(args, args.ranks)
    run = script.start(__file__, args)
    folder = Path(tempfile.mkdtemp(prefix="survive-zero-"))
    result: dict = {"stages": args.stages, "kills": args.kills + 1}
    try:
        for stage in args.stages:
            alone, job = (ZeroJob(folder / f"{what}-{stage}", args, stage) for what in ("alone", "killed"))
            whole = alone.finish(args.ranks)
            found = suffer(job, args)
            found |= {
                "losses_equal": job.losses() == alone.losses(),
                "weights_equal": found["weights_sha256"] == whole["weights_sha256"],
                "sequences_equal": job.samples() == alone.samples(),
            }
            run.log(stage=stage, **found)
            print(f"stage {stage}: " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
            for name, value in found.items():
                if isinstance(value, bool):
                    result[name] = result.get(name, True) and value
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    must = set(result) - {"stages", "kills", "killed_in_a_save"}  # a save may be quicker than the kill
    if wrong := sorted(name for name in must if not result[name]):
        raise script.CheckFailed(f"not {', not '.join(wrong)}", result)
    return result


if __name__ == "__main__":
    script.run(main)

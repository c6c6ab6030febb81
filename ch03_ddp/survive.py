"""Kill a DDP job at random moments and in a save, spoil its newest checkpoint, change its ranks: the same end.

You learn   what makes a resume exact on N ranks (the random state of each, the position in the data), why a save is
            written beside and hashed, and what stays the same when the number of ranks does not
Laptop      python ch03_ddp/survive.py
GPU node    python ch03_ddp/survive.py --preset small --seq-len 512 --ranks 8 --other-ranks 4,2
Cluster     the same on one node; launch/train.sbatch resumes by itself, slurm_cluster.py shows it
You see     the losses and the hash of the weights equal to those of a run that was left alone, bit for bit; on other
            numbers of ranks the losses equal to some 1e-6, and every sequence taken once, by whichever rank
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ch01_intro import checkpoint
from common import script
from common.exercises import gpu_count
from common.logs import Metrics, get_logger
from common.process import Child, Finished

log = get_logger()


class Job:
    """A training in a folder that may be started, killed and started again."""

    script = "ch03_ddp/train_ddp.py"

    def __init__(self, out: Path, args: argparse.Namespace) -> None:
        self.out, self.args, self.last_error = out, args, ""

    def command(self, ranks: int, flags: tuple[str, ...]) -> list[str]:
        launcher = ["torchrun", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else ["python"]
        return [*launcher, *self.words(flags)]

    def words(self, flags: tuple[str, ...]) -> list[str]:
        """The script and what it is told."""
        a = self.args
        return [
            self.script, "--preset", a.preset, "--steps", str(a.steps), "--out", str(self.out),
            "--save-every", str(a.save_every), "--resume", "auto", "--seed", str(a.seed), "--device", a.device,
            "--global-batch", str(a.global_batch), "--batch-size", "2",
            "--seq-len", str(a.seq_len), "--dtype", a.dtype, "--dropout", str(a.dropout), "--log-every", "1",
            "--sample-tokens", "0", "--val-tokens", "1024", "--record-samples", "--run-dir", str(self.out / "run"),
            *flags,
        ]  # fmt: skip

    def finish(self, ranks: int, *flags: str) -> dict:
        """Train to the end; the RESULT."""
        with Child(self.command(ranks, flags)) as child:
            done = child.wait(self.args.timeout_s)
        self.last_error = done.stderr
        return self._result(done)

    def _result(self, done: Finished) -> dict:
        if done.result is None:
            why = done.reason(self.args.timeout_s)
            raise script.UserError(f"the training failed ({why}); run it by itself: {' '.join(done.command)}")
        return done.result

    def kill_when(self, condition: Callable[[], object], what: str, ranks: int, *flags: str) -> bool:
        """Start it, and SIGKILL everything the moment `condition` holds. False if the training was over before."""
        begun = self.losses_file()
        deadline = time.monotonic() + self.args.timeout_s
        with Child(self.command(ranks, flags)) as child:
            while self.losses_file() == begun:  # a run that resumes begins with a new, cut-back file
                self._still_there(child, deadline, "its first step")
                time.sleep(0.01)
            workers = [process.pid for process in child.tree()]
            while not condition():
                if child.process.poll() is not None:
                    self._result(child.wait(5))
                    return False
                self._still_there(child, deadline, what)
                time.sleep(0.0005)
            for pid in workers:  # first these, without looking around: the moment matters
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            child.kill()
        return True

    def _still_there(self, child: Child, deadline: float, what: str) -> None:
        if child.process.poll() is not None and child.process.returncode:
            raise script.UserError(f"the run ended before {what} ({child.wait(5).reason()}); run it by itself")
        if time.monotonic() > deadline:
            raise script.UserError(f"{what} was not reached in {self.args.timeout_s:g} s; raise --timeout-s")

    def losses_file(self) -> int | None:
        path = self.out / "losses.jsonl"
        return path.stat().st_ino if path.exists() else None

    def losses(self) -> list[float]:
        path = self.out / "losses.jsonl"
        return [row["loss"] for row in Metrics.read(path)] if path.exists() else []

    def saving(self) -> list[Path]:
        """Saves under way, or left behind by a kill: the folder is there, its name is not."""
        return list((self.out / "checkpoints").glob(".step-*.partial"))

    def checkpoints(self) -> list[Path]:
        return checkpoint.every(self.out / "checkpoints")

    def samples(self) -> dict[int, Counter]:
        """By step, how often each sequence was taken by any of the ranks, in the steps that count."""
        found: dict[int, Counter] = {}
        for row in self.sample_rows():
            found.setdefault(row["step"], Counter()).update(row["sequences"])
        return dict(sorted(found.items()))

    def ranks_by_step(self) -> dict[int, int]:
        """How many ranks took part in each step."""
        return dict(sorted(Counter(row["step"] for row in self.sample_rows()).items()))

    def newest_ranks(self) -> int:
        """How many ranks took part in the newest step."""
        return next(reversed(self.ranks_by_step().values()), 0)

    def sample_rows(self) -> list[dict]:
        return [row for path in (self.out / "samples").glob("*.jsonl") for row in Metrics.read(path)]


def spoil(path: Path) -> None:
    """Change one byte in the middle, as a disk might."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def choose_device(args: argparse.Namespace, ranks: int) -> None:
    """GPUs only where there is one for each rank: a laptop's one GPU cannot be two devices, its cores can."""
    if args.device == "auto" and gpu_count() < ranks:
        args.device = "cpu"


def kill_often(job: Job, alone: Job, args: argparse.Namespace) -> dict:
    """Kills at random steps, one in a save, one spoilt checkpoint; then to the end, held against `alone`."""
    moments = sorted(random.Random(args.seed).sample(range(2, args.steps - 1), args.kills))
    for moment in moments:
        job.kill_when(lambda at=moment: len(job.losses()) >= at, f"step {moment}", args.ranks, "--async-save")
        log.info("killed -9", after_step=len(job.losses()))
    for left in job.saving():  # by the kills so far: it would be taken for a save of the next run
        shutil.rmtree(left)
    # With two whole ones before it: one is spoilt below, and the other has to serve.
    in_save = job.kill_when(lambda: len(job.checkpoints()) > 1 and job.saving(), "a save", args.ranks)
    in_save = in_save and bool(job.saving())
    log.info("killed -9 in a save" if in_save else "the save was quicker", after_step=len(job.losses()))
    before = job.checkpoints()
    spoil(before[-1] / "state.pt")
    ended = job.finish(args.ranks, "--async-save")
    told = [f"after steps {', '.join(map(str, moments))}"] * bool(moments) + ["in a save"] * in_save
    print(f"killed {' and '.join(told)}, newest checkpoint spoilt")
    return {
        "kills": len(moments) + 1,
        "killed_in_a_save": in_save,
        "spoilt_checkpoint_named": f"{before[-1].name} is corrupt" in job.last_error,
        "resumed_before_the_spoilt": ended["resumed_at_step"] < int(before[-1].name.split("-")[1]),
        "losses_equal": job.losses() == alone.losses(),
        "weights_sha256": ended["weights_sha256"],
        "sequences_equal": job.samples() == alone.samples(),
    }


def change_ranks(job: Job, alone: Job, args: argparse.Namespace) -> dict:
    """A part on each number of ranks, the rest on the last one: what differs from `alone`."""
    counts = [args.ranks, *args.other_ranks]
    for number, ranks in enumerate(counts[:-1], 1):
        at = number * args.steps // len(counts)
        job.kill_when(lambda at=at: len(job.losses()) >= at, f"step {at}", ranks)
    job.finish(counts[-1])
    differences = [abs(a - b) for a, b in zip(job.losses(), alone.losses(), strict=True)]
    taken, wanted = job.samples(), alone.samples()
    print(f"on {' -> '.join(map(str, counts))} ranks: losses differ by {max(differences):.1e} at most")
    return {
        "largest_loss_difference_other_ranks": max(differences),
        "sequences_equal_other_ranks": taken == wanted,
    }


def counts(text: str) -> list[int]:
    """argparse type: numbers of ranks, comma separated; none for an empty string."""
    return script.comma_list(script.at_least(1))(text) if text else []


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=script.at_least(10), default=30)
    parser.add_argument("--save-every", type=script.at_least(1), default=4)
    parser.add_argument("--global-batch", type=script.at_least(1), default=8)
    parser.add_argument("--seq-len", type=script.at_least(2), default=64)
    parser.add_argument("--dropout", type=float, default=0.1, help="needs each rank's random state")
    parser.add_argument("--ranks", type=script.at_least(2), default=2)
    parser.add_argument("--other-ranks", type=counts, default="1,3", help="'': only on the same number")
    parser.add_argument("--kills", type=script.at_least(0), default=5, help="at random steps; one more comes in a save")
    parser.add_argument("--timeout-s", type=script.positive, default=300, help="for each part of a run")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the part that is killed")
    args = parser.parse_args(argv)
    if args.steps < args.kills + 2 * args.save_every + 3:
        raise script.UserError(f"{args.steps} steps leave no room for {args.kills} kills; raise --steps")
    choose_device(args, max([args.ranks, *args.other_ranks]))
    run = script.start(__file__, args)
    folder = Path(tempfile.mkdtemp(prefix="survive-"))
    try:
        alone = Job(folder / "alone", args)
        whole = alone.finish(args.ranks)
        result = kill_often(Job(folder / "killed", args), alone, args)
        result["weights_equal"] = result["weights_sha256"] == whole["weights_sha256"]
        if args.other_ranks:
            steady = alone
            if (args.dropout, args.dtype) != (0.0, "fp32"):  # each rank draws for itself: other ranks, other draws
                args.dropout, args.dtype = 0.0, "fp32"
                steady = Job(folder / "steady", args)
                steady.finish(args.ranks)
            result |= change_ranks(Job(folder / "changed", args), steady, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    run.log(**result)
    same = all(result[name] for name in ("losses_equal", "weights_equal", "sequences_equal"))
    print(f"losses, weights and sequences {'equal to the last bit' if same else 'NOT equal'}")
    return result


if __name__ == "__main__":
    script.run(main)

"""Pull the plug: kill -9 a training run at random moments, resume it, and compare it with a run that was left alone.

You learn   what a checkpoint must hold (weights, optimizer, random numbers, position in the data) for a resume to be
            exact, and why it is written beside and renamed
Laptop      python ch01_intro/resume_after_kill.py
GPU node    python ch01_intro/resume_after_kill.py --preset small --seq-len 512
Cluster     the same on one node; chapter 3 kills nodes
You see     the losses and the final weights of both runs equal, bit for bit on a CPU (GPU kernels that add in random
            order may differ in the last bits: then the largest difference is what counts)
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

from common import script
from common.logs import Metrics, get_logger
from common.process import Child

log = get_logger()


def command(out: Path, args: argparse.Namespace) -> list[str]:
    return [
        "python", "ch01_intro/train_baseline.py", "--preset", args.preset, "--steps", str(args.steps),
        "--out", str(out), "--save-every", str(args.save_every), "--resume", "auto",
        "--seed", str(args.seed), "--device", args.device,
        "--batch-size", str(args.batch_size), "--seq-len", str(args.seq_len), "--log-every", "1",
        "--sample-tokens", "0", "--val-tokens", "4096", "--run-dir", str(out / "run"),
    ]  # fmt: skip


def train(out: Path, args: argparse.Namespace) -> dict:
    with Child(command(out, args)) as child:
        done = child.wait(args.timeout_s)
    if done.result is None:
        raise script.UserError(f"the training run failed ({done.reason(args.timeout_s)}); run it by itself to see why")
    return done.result


def losses(out: Path) -> list[dict]:
    path = out / "losses.jsonl"
    return Metrics.read(path) if path.exists() else []


def kill_at(step: int, out: Path, args: argparse.Namespace) -> int:
    """Start or resume the run, kill its whole process tree as soon as `step` is done; the last step it had recorded."""
    deadline = time.monotonic() + args.timeout_s
    path = out / "losses.jsonl"
    before = path.stat().st_ino if path.exists() else None  # the resumed run begins with a new, cut-back file
    with Child(command(out, args)) as child:
        while not path.exists() or path.stat().st_ino == before or not (rows := losses(out)) or rows[-1]["step"] < step:
            if child.process.poll() is not None:
                raise script.UserError(f"the run ended before step {step} ({child.wait(5).reason()}); run it by itself")
            if time.monotonic() > deadline:
                raise script.UserError(f"step {step} was not reached in {args.timeout_s:g} s; raise --timeout-s")
            time.sleep(0.01)
        child.kill()
    return losses(out)[-1]["step"]


def draw(whole: list[dict], attempts: list[list[dict]], run: script.Run) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in whole], [r["loss"] for r in whole], color="#c9c9c9", linewidth=6, label="left alone")
    for number, rows in enumerate(attempts):
        label = f"killed after step {rows[-1]['step']}" if number < len(attempts) - 1 else "resumed to the end"
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], linewidth=1.6, label=label)
        if number < len(attempts) - 1:
            axes.plot(rows[-1]["step"], rows[-1]["loss"], "x", color="#b3261e", markersize=10, markeredgewidth=2.5)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Killed, resumed, and the same to the last bit")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(run.path("resume.png"), dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=script.at_least(4), default=60)
    parser.add_argument("--save-every", type=script.at_least(1), default=8)
    parser.add_argument("--batch-size", type=script.at_least(1), default=4)
    parser.add_argument("--seq-len", type=script.at_least(2), default=64)
    parser.add_argument("--kills", type=script.at_least(1), default=2)
    parser.add_argument("--timeout-s", type=script.positive, default=600, help="for each part of the run")
    args = parser.parse_args(argv)
    if args.steps < args.save_every + args.kills + 2:
        raise script.UserError(f"{args.steps} steps leave no room for {args.kills} kills; raise --steps")
    run = script.start(__file__, args)
    folder = Path(tempfile.mkdtemp(prefix="resume-"))
    try:
        alone = train(folder / "alone", args)
        whole = losses(folder / "alone")
        # after the first checkpoint, so that each attempt resumes from one; at a random step between two of them
        choices = range(args.save_every + 1, args.steps - 1)
        moments = sorted(random.Random(args.seed).sample(choices, args.kills))
        attempts = []
        for moment in moments:
            reached = kill_at(moment, folder / "killed", args)
            attempts.append(losses(folder / "killed"))
            log.info("killed -9", after_step=reached)
        resumed = train(folder / "killed", args)
        attempts.append(losses(folder / "killed"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    again = attempts[-1]
    draw(whole, attempts, run)
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(whole, again, strict=True)]
    result = {
        "kills": args.kills,
        "killed_after_step": [rows[-1]["step"] for rows in attempts[:-1]],
        "resumed_at_step": resumed["resumed_at_step"],
        "steps_compared": len(differences),
        "losses_equal": whole == again,
        "largest_loss_difference": max(differences),
        "weights_equal": alone["weights_sha256"] == resumed["weights_sha256"],
        "weights_sha256": resumed["weights_sha256"],
    }
    same = "equal to the last bit" if result["losses_equal"] and result["weights_equal"] else "NOT equal"
    print(
        f"killed after steps {', '.join(map(str, result['killed_after_step']))}, resumed at "
        f"{result['resumed_at_step']}: {len(differences)} losses and {alone['parameters']:,} weights {same}"
    )
    return result


if __name__ == "__main__":
    script.run(main)

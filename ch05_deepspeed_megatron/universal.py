"""A DeepSpeed checkpoint outlives its ranks and its stage: saved by 2 ranks, read by 1 and 4, in ZeRO 3, 1 and 2.

You learn   why DeepSpeed reads a checkpoint back on as many ranks only, what its universal format is, and what a change
            of ranks or stage leaves as it was: weights and Adam's moments, bit for bit, and the order of the data
Laptop      python ch05_deepspeed_megatron/universal.py
GPU node    python ch05_deepspeed_megatron/universal.py --preset small --seq-len 512 --ranks 8 --other-ranks 4:3,2:1
Cluster     train_deepspeed.py does it by itself, on whatever ranks a job comes back
You see     equal weights and moments after each load; losses equal to those of the run that went on undisturbed, to
            some 1e-6; one hash for the checkpoint consolidated by one process and for the model that was trained
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

from ch01_intro import training
from ch03_ddp.survive import choose_device
from ch04_fsdp import export
from ch05_deepspeed_megatron import checkpoints, consolidate, engine, options, train_deepspeed, universal_format
from common import dist, lm, ranks, script
from common.logs import Metrics

Hashes = dict[str, str]


def train(flags: list[str]) -> dict:
    return train_deepspeed.main(flags)


def load_and_save(flags: list[str], source: Path, out: Path) -> None:
    """On each rank: read a checkpoint, and write it again as these ranks hold it."""
    args = options.parse(None, flags)
    settings = options.settings(args)
    corpus = training.load_corpus(args)
    with dist.session(args.device, threads=args.threads) as ctx:
        keeper = checkpoints.Keeper(out, options.of_a_resume(args, corpus, ctx, settings), ctx, keep=1)
        model = engine.build(args.preset, settings, ctx, seq_len=args.seq_len, seed=args.seed + 1)
        zero = engine.initialize(model, settings, ctx)
        step, position = keeper.load(source, zero)
        keeper.save(step, zero, position)


def hashes(checkpoint: Path) -> Hashes:
    """Of the weight and the moments of each parameter, whole, whatever ranks and stage have saved them."""
    return {
        f"{name} {state}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for state in universal_format.STATES
        for name, tensor in consolidate.stored_parameters(checkpoint / checkpoints.TAG, state)
    }


class Runs:
    """Trainings that differ in ranks and stage alone."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args

    def flags(self, stage: int, out: Path) -> list[str]:
        a = self.args
        config = options.CONFIGS / f"zero{stage}.json"
        return [
            "--deepspeed-config", str(config), "--preset", a.preset, "--steps", str(a.steps), "--seq-len",
            str(a.seq_len), "--global-batch", str(a.global_batch), "--batch-size", "1", "--dtype", "fp32", "--device",
            a.device, "--out", str(out), "--save-every", str(a.steps // 2), "--keep", "9", "--val-tokens", "256",
            "--sample-tokens", "0", "--log-every", "1", "--run-dir", str(out / "run"),
        ]  # fmt: skip

    def train(self, count: int, stage: int, *more: str) -> tuple[dict, list[float], Path]:
        """RESULT, losses and folder of a training to its end."""
        out = self.folder / f"{count}-ranks-stage-{stage}{'-resumed' if more else ''}"
        done = ranks.run_ranks(train, count, [*self.flags(stage, out), *more], timeout_s=self.args.timeout_s)
        result = ranks.values(done)[0]
        return result, [row["loss"] for row in Metrics.read(out / "losses.jsonl") if "loss" in row], out

    def load_and_save(self, count: int, stage: int, source: Path) -> Path:
        out = self.folder / f"{count}-ranks-stage-{stage}-loaded"
        job = (self.flags(stage, out), source, out)
        ranks.values(ranks.run_ranks(load_and_save, count, *job, timeout_s=self.args.timeout_s))
        return out / source.name


def parse_place(text: str) -> tuple[int, int]:
    """argparse type: RANKS:STAGE."""
    count, _, stage = text.partition(":")
    if not count.isdecimal() or int(count) < 1 or stage not in ("1", "2", "3"):
        raise script.UserError(f"{text!r} is not like 4:3; write RANKS:STAGE, with a stage of 1, 2 or 3")
    return int(count), int(stage)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=script.at_least(2), default=8, help="half of them before the change")
    parser.add_argument("--global-batch", type=script.at_least(1), default=4)
    parser.add_argument("--seq-len", type=script.at_least(2), default=64)
    parser.add_argument("--ranks", type=script.at_least(2), default=2)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="that saves")
    parser.add_argument("--other-ranks", type=script.comma_list(parse_place), default="1:3,4:3,2:1,1:2",
                        help="RANKS:STAGE that go on")  # fmt: skip
    parser.add_argument("--timeout-s", type=script.positive, default=300, help="for each part")
    args = parser.parse_args(argv)
    most = max(args.ranks, *(count for count, _ in args.other_ranks))
    for count in (args.ranks, *(count for count, _ in args.other_ranks)):
        if args.global_batch % count:
            raise script.UserError(f"--global-batch {args.global_batch} does not divide by {count} ranks; change one")
    choose_device(args, most)
    script.start(__file__, args)
    ranks.preload("ch05_deepspeed_megatron.universal", "transformers.models.llama.modeling_llama")
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        ranks.preload("deepspeed")  # which must not touch a GPU before the fork
    folder = Path(tempfile.mkdtemp(prefix="universal-"))
    try:
        return follow(Runs(folder, args), args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def follow(runs: Runs, args: argparse.Namespace) -> dict:
    whole, losses, out = runs.train(args.ranks, args.stage)
    source = out / "checkpoints" / f"step-{args.steps // 2:08d}"
    wanted, equal, differences = hashes(source), [], []
    for count, stage in args.other_ranks:
        equal.append(hashes(runs.load_and_save(count, stage, source)) == wanted)
        _, found, _ = runs.train(count, stage, "--resume", str(source))
        differences.append(max(abs(a - b) for a, b in zip(found, losses, strict=True)))
        print(
            f"{args.ranks} ranks of stage {args.stage} -> {count} of stage {stage}: weights and moments "
            f"{'equal' if equal[-1] else 'NOT equal'}, losses differ by {differences[-1]:.1e}", flush=True,
        )  # fmt: skip
    trained = lm.load(str(out / "model"))
    exported = runs.folder / "exported"
    tensors = consolidate.stored_parameters(out / "checkpoints" / f"step-{args.steps:08d}" / checkpoints.TAG)
    export.write_folder(exported, trained.config, None, tensors)
    consolidated = lm.load(str(exported))
    tokens = torch.arange(args.seq_len)[None]
    with torch.no_grad():
        same = torch.equal(trained(tokens).logits, consolidated(tokens).logits)
    result = {
        "ranks": args.ranks,
        "stage": args.stage,
        "other_ranks": [f"{count}:{stage}" for count, stage in args.other_ranks],
        "states_compared": len(wanted),
        "states_equal": all(equal),
        "largest_loss_difference": max(differences),
        "consolidated_equal": lm.weights_sha256(consolidated) == whole["weights_sha256"],
        "logits_equal": same,
    }
    if wrong := [name for name in ("states_equal", "consolidated_equal", "logits_equal") if not result[name]]:
        raise script.CheckFailed(f"not {', not '.join(wrong)}", result)
    return result


if __name__ == "__main__":
    script.run(main)

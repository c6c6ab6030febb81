"""Is it the same computation? ZeRO 1, 2 and 3 with their options, against one process: gradients, norm, weights.

You learn   which settings of DeepSpeed change where numbers are and not what they are; that an engine must be told not
            to average over micro-batches where they hold unequal numbers of tokens
Laptop      python -m ch05_deepspeed_megatron.parity
One         python -m ch05_deepspeed_megatron.parity --option zero-3+cpu --ranks 4
GPU node    torchrun --standalone --nproc-per-node=gpu -m ch05_deepspeed_megatron.parity
Cluster     srun python -m ch05_deepspeed_megatron.parity
You see     chapter 2's table, a row an option: the largest relative error of any gradient, about 1e-6 (DeepSpeed sums
            in float32); with --scale-by-micro-batches what accumulates is named, at a quarter of its gradient

The gradient norm is DeepSpeed's own, by which it clips. In each cell the worst of accumulation 1 and 4, tied and untied
embeddings, all parameters trained and some frozen, a whole last batch and one that does not divide by the ranks; rows
are ragged.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.harness import Case, Outcome
from ch02_hardware_parallelism.parity import whole_numbers
from ch04_fsdp.parity import pairs, verdict
from ch05_deepspeed_megatron.strategies import OPTIONS, Averaged, RaggedLlama, Zero, option
from common import dist, script


def cases(ranks: list[int], accumulation: list[int]) -> list[Case]:
    """Chapter 4's eight, in the one type that DeepSpeed sums gradients in."""
    return [replace(case, dtype="float32") for case in pairs(ranks, accumulation)]


def classes(args: argparse.Namespace) -> list[type[Zero]]:
    """
    Raises:
        UserError: there is no such option.
    """
    names = OPTIONS if args.option == "all" else args.option.split(",")
    if unknown := [name for name in names if name not in OPTIONS]:
        raise script.UserError(f"no option {unknown[0]!r}; one of {', '.join(OPTIONS)}")
    return [option(name, *([Averaged] if args.scale_by_micro_batches else [])) for name in names]


def compare(args: argparse.Namespace) -> list[Outcome]:
    """On the ranks that torchrun or srun started, else on CPU ranks started here."""
    launch, chosen = dist.read_launch(), classes(args)
    if launch.launcher == "python":
        wanted = cases(args.ranks, args.accumulation)
        return harness.check(chosen, wanted, problem=RaggedLlama(), timeout_s=3600, in_turn=args.quick)
    with dist.session(args.device) as ctx:
        wanted = cases([ctx.world_size], args.accumulation)
        return harness.check_here(chosen, wanted, RaggedLlama(), ctx, in_turn=args.quick)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--option", default="all", help="all, or a stage with what differs, comma separated")
    parser.add_argument("--ranks", type=whole_numbers, default=[2, 4], help="how many, comma separated")
    parser.add_argument("--accumulation", type=whole_numbers, default=[1, 4], help="micro-batches a step")
    parser.add_argument("--quick", action="store_true", help="each option in one of the eight cases, in turn")
    parser.add_argument("--scale-by-micro-batches", action="store_true", help="a planted fault: engine.backward "
                        "divides by the micro-batches, as is its default, a loss that is divided already")  # fmt: skip
    args = parser.parse_args(argv)
    if max(args.ranks) > 8:
        raise script.UserError(f"--ranks {max(args.ranks)} is more than this is made for; take 1 to 8")
    script.start(__file__, args)
    return verdict(compare(args))


if __name__ == "__main__":
    script.run(main)

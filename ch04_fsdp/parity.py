"""Is it the same computation? Every strategy x offload x recomputation of train_fsdp.py, against one process.

You learn   that sharding, offloading and recomputing change where numbers are and when they come about, not what they
            are; how to cover thousands of combinations by a few hundred that hold every pair of settings
Laptop      python -m ch04_fsdp.parity
One         python -m ch04_fsdp.parity --option hybrid+cpu+block --ranks 4 --every-case
GPU node    torchrun --standalone --nproc-per-node=gpu -m ch04_fsdp.parity
Cluster     srun python -m ch04_fsdp.parity
You see     chapter 2's table, a row an option: the largest relative error of any gradient, about 1e-15 in float64 and
            1e-6 in float32; in older versions of torch FSDP2 summed over gloo what it should have averaged

The gradient norm is the one that the script clips by, summed over shards and not over copies. In each cell the worst of
accumulation 1 and 4, tied and untied embeddings, all parameters trained and some frozen, a whole last batch and one
that does not divide by the ranks; rows are ragged.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.harness import TOLERANCE, Case, Outcome
from ch02_hardware_parallelism.parity import explain, matrix, whole_numbers
from ch04_fsdp.strategies import OPTIONS, RaggedLlama, option
from common import dist, script


def pairs(ranks: Sequence[int], accumulation: Sequence[int]) -> list[Case]:
    """Eight cases in which each two settings meet in all four combinations: an orthogonal array of strength two."""
    dtypes = list(TOLERANCE)
    return [
        Case(
            ranks[a % len(ranks)], accumulation[b % len(accumulation)], dtypes[c],
            tied=a == b, frozen=a != c, uneven=b != c, by_hand=False,
        )
        for a, b, c in itertools.product((0, 1), repeat=3)
    ]  # fmt: skip


def chosen(args: argparse.Namespace) -> list[str]:
    """
    Raises:
        UserError: there is no such option.
    """
    if args.option == "all":
        return OPTIONS
    names = args.option.split(",")
    if unknown := [name for name in names if name not in OPTIONS]:
        raise script.UserError(
            f"no option {unknown[0]!r}; they are written strategy+offload+recompute, as in {', '.join(OPTIONS[::13])}"
        )
    return names


def compare(args: argparse.Namespace, options: list[str]) -> list[Outcome]:
    """On the ranks that torchrun or srun started, else on CPU ranks started here."""
    launch = dist.read_launch()
    ranks = args.ranks if launch.launcher == "python" else [launch.world_size]
    classes = [option(name) for name in options]
    cases = pairs(ranks, args.accumulation)
    if args.every_case:
        cases = harness.all_cases(ranks, args.accumulation, list(TOLERANCE), by_hand=False)
    if launch.launcher == "python":
        return harness.check(classes, cases, problem=RaggedLlama(), timeout_s=3600, in_turn=args.quick)
    with dist.session(args.device) as ctx:
        return harness.check_here(classes, cases, RaggedLlama(), ctx, in_turn=args.quick)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--option", default="all", help="all, or strategy+offload+recompute, comma separated")
    parser.add_argument("--ranks", type=whole_numbers, default=[2, 4], help="how many, comma separated")
    parser.add_argument("--accumulation", type=whole_numbers, default=[1, 4], help="micro-batches a step")
    parser.add_argument("--every-case", action="store_true", help="all 64 combinations of settings, not eight")
    parser.add_argument("--quick", action="store_true", help="each option in one of the eight, in turn")
    args = parser.parse_args(argv)
    options = chosen(args)
    if max(args.ranks) > 8:
        raise script.UserError(f"--ranks {max(args.ranks)} is more than this is made for; take 1 to 8")
    script.start(__file__, args)
    return verdict(compare(args, options))


def summary(outcomes: list[Outcome]) -> dict:
    """RESULT fields. Errors are relative, the largest of all that was compared."""
    done = [outcome for outcome in outcomes if not outcome.skipped]
    return {
        "options": len({outcome.strategy for outcome in done}),
        "compared": len(done),
        "wrong": len([outcome for outcome in done if not outcome.ok]),
        "skipped": len(outcomes) - len(done),
        "largest_norm_error": max((o.norm_error for o in done), default=None),
        **{
            f"largest_error_{d}": max((o.gradient_error for o in done if o.case.dtype == d), default=None)
            for d in TOLERANCE
        },
    }


def verdict(outcomes: list[Outcome]) -> dict:
    """Print the table, and what is wrong in words. Returns the RESULT.

    Raises:
        UserError: nothing could be compared.
        CheckFailed: a comparison differs from one process.
    """
    done = [outcome for outcome in outcomes if not outcome.skipped]
    wrong = [outcome for outcome in done if not outcome.ok]
    if dist.read_launch().rank == 0:
        print(matrix(outcomes))
        if notes := explain(outcomes):
            print(notes)
    if not done:
        raise script.UserError(f"nothing was compared ({outcomes[0].skipped}); take other --ranks")
    result = summary(outcomes)
    if wrong:
        raise script.CheckFailed(f"{len(wrong)} of {len(done)} comparisons differ from one process", result)
    return result


if __name__ == "__main__":
    script.run(main)

"""Does DeepSpeed's pipeline compute one process's gradients? Stages, replicas, ZeRO 1, recomputation; and seven bugs.

You learn   what has to be right for it: the divisor of the loss, the tied embedding's two gradients, the sum over
            replicas, one norm over all stages; that the loss alone would not have shown any of it
Laptop      python -m ch05_deepspeed_megatron.pipeline_parity
One         python -m ch05_deepspeed_megatron.pipeline_parity --option zero-1 --ranks 4 --every-case
GPU node    torchrun --standalone --nproc-per-node=4 -m ch05_deepspeed_megatron.pipeline_parity
Cluster     srun --ntasks=4 python -m ch05_deepspeed_megatron.pipeline_parity
You see     chapter 2's table, a row an option: the largest relative error of any gradient, about 1e-6 (in float32:
            DeepSpeed refuses to sum float64); then each bug, planted, and what the harness says of it

Two ranks are two stages, four are two stages and two data replicas, or four stages. Rows are ragged. Compared are eight
cases in which each two of accumulation 1 and 4, tied and untied, frozen and not, a whole last micro-batch and an uneven
one meet in all four combinations.

Of the bugs one is DeepSpeed 0.19.8 as it comes: in float32 without ZeRO it clips by the norm of the first stage alone.
"""

from __future__ import annotations

import argparse
from typing import Any

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.harness import Case, Outcome
from ch02_hardware_parallelism.parity import explain, matrix, whole_numbers
from ch03_ddp.strategies import RaggedLlama
from ch04_fsdp.parity import summary
from ch05_deepspeed_megatron.parity import cases
from ch05_deepspeed_megatron.pipeline_strategies import OPTIONS, PLANTED
from common import dist, script


def chosen(text: str, known: dict[str, Any]) -> list[str]:
    """
    Raises:
        UserError: there is no such option.
    """
    names = list(known) if text == "all" else [name for name in text.split(",") if name != "none"]
    if unknown := [name for name in names if name not in known]:
        raise script.UserError(f"no option {unknown[0]!r}; one of {', '.join(known)}, all or none")
    return names


def compare(args: argparse.Namespace, options: list[str], bugs: list[str]) -> tuple[list[Outcome], list[Outcome]]:
    """On the ranks that torchrun or srun started, else on CPU ranks started here: the options', the bugs' outcomes."""
    launch = dist.read_launch()
    ranks = args.ranks if launch.launcher == "python" else [launch.world_size]
    wanted = cases(ranks, args.accumulation)
    if args.every_case:
        wanted = harness.all_cases(ranks, args.accumulation, ["float32"], by_hand=False)
    # All bugs show in it: several micro-batches of unequal tokens, replicas where there are enough ranks, tied ends.
    worst = [Case(max(ranks), max(args.accumulation), "float32", tied=True, by_hand=False)]
    right, wrong = [OPTIONS[name] for name in options], [PLANTED[name] for name in bugs]
    if launch.launcher == "python":
        checked = harness.check(right, wanted, RaggedLlama(), timeout_s=3600, in_turn=args.quick) if right else []
        return checked, harness.check(wrong, worst, RaggedLlama(), timeout_s=600) if wrong else []
    with dist.session(args.device) as ctx:
        checked = harness.check_here(right, wanted, RaggedLlama(), ctx, in_turn=args.quick) if right else []
        return checked, harness.check_here(wrong, worst, RaggedLlama(), ctx) if wrong else []


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--option", default="all", help=f"all, none, or of {', '.join(OPTIONS)}, comma separated")
    parser.add_argument("--planted", default="all", help=f"all, none, or of {', '.join(PLANTED)}")
    parser.add_argument("--ranks", type=whole_numbers, default=[2, 4], help="how many, comma separated")
    parser.add_argument("--accumulation", type=whole_numbers, default=[1, 4], help="micro-batches a step")
    parser.add_argument("--every-case", action="store_true", help="all combinations of settings, not eight")
    parser.add_argument("--quick", action="store_true", help="each option in one of the cases, in turn")
    args = parser.parse_args(argv)
    options, bugs = chosen(args.option, OPTIONS), chosen(args.planted, PLANTED)
    if max(args.ranks) > 8:
        raise script.UserError(f"--ranks {max(args.ranks)} is more than this is made for; take 2 or 4")
    script.start(__file__, args)
    outcomes, planted = compare(args, options, bugs)
    done = [outcome for outcome in outcomes if not outcome.skipped]
    if not done and not any(not outcome.skipped for outcome in planted):
        reason = next((outcome.skipped for outcome in [*outcomes, *planted]), "neither --option nor --planted")
        raise script.UserError(f"nothing was compared ({reason}); take other --ranks or options")
    wrong = [outcome for outcome in done if not outcome.ok]
    shown = [outcome for outcome in planted if not outcome.skipped]
    missed = [outcome.strategy for outcome in shown if outcome.ok]
    if dist.read_launch().rank == 0:
        if outcomes:
            print(matrix(outcomes))
            if notes := explain(outcomes):
                print(notes)
        for outcome in planted:
            print(f"planted {outcome.strategy:20} {outcome.diagnosis() or 'not seen'}")
    result = summary(outcomes) | {"planted": len(shown), "caught": len(shown) - len(missed)}
    if wrong or missed:
        raise script.CheckFailed(
            f"{len(wrong)} of {len(done)} comparisons differ from one process; of the bugs {len(missed)} went unseen",
            result,
        )
    return result


if __name__ == "__main__":
    script.run(main)

"""Are the experts' gradients right? DeepSpeed-MoE against one process that holds all experts, to ten digits.

You learn   by what the gradient of an expert must be divided, and by what DeepSpeed divides it; what becomes of the
            gradient norm when each rank holds other experts; which settings can be compared at all
Laptop      python -m ch05_deepspeed_megatron.moe_parity
One         python -m ch05_deepspeed_megatron.moe_parity --problem top2 --option ep2+zero1 --ranks 4
A fault     python -m ch05_deepspeed_megatron.moe_parity --problem top1 --option ep2+zero0+divided-by-copies --ranks 2
GPU node    torchrun --standalone --nproc-per-node=gpu -m ch05_deepspeed_megatron.moe_parity
Cluster     srun python -m ch05_deepspeed_megatron.moe_parity
You see     chapter 2's table for each problem; the two faults at its end, named in words: experts' gradients ep_size
            times too large, and the norm by which DeepSpeed itself clips without ZeRO

The divisor. A rank's loss is its tokens' sum x ranks / tokens of the step. An expert gets the tokens of its whole
expert-parallel group, so its gradient on one rank already is a sum over ep_size ranks; the all-reduce adds up the other
groups. Everything is in it once, and it must be divided by all ranks, like any gradient: not by those that reduce it.
DeepSpeed did the latter (issue 6545: ep_size times too large); 0.19.8 is right in stages 0, 1 and 2, for any ep_size.
PyTorch had the same with FSDP2 (issue 160285).

The norm. Stages 1 and 2 add up squares over all ranks: each expert once. Stage 0 averages over ranks, see moe_step.py.

What can be compared. Without drops a token's way depends on the token alone: any split of the batch gives the same
(problem top2-whole: the reference sees the batch whole). The balancing loss is a product of two means over a rank's
pass, and capacity is a rank's and pass's too: there the reference sees the same passes, one after the other. Top 1 with
drops has no reference: which tokens of a full expert stay is drawn, and with use_rts=False left to torch.topk's ties.
"""

from __future__ import annotations

import argparse
import os

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.harness import Case, Outcome
from ch02_hardware_parallelism.parity import explain, matrix, whole_numbers
from ch04_fsdp import parity as fsdp_parity
from ch05_deepspeed_megatron.moe_strategies import FAULTS, OPTIONS, PROBLEMS, option
from common import dist, ranks, script
from common.dist import Context

FAULTY = [f"ep2+zero0+{fault}" for fault in FAULTS]
Work = list[tuple[str, list[str], list[Case]]]  # problem, options, cases
Outcomes = list[tuple[str, Outcome]]  # with its problem


def plan(world_size: int, args: argparse.Namespace) -> Work:
    """What to compare on so many ranks: options x problems in eight cases, and each fault once."""
    cases = fsdp_parity.pairs([world_size], args.accumulation)
    if args.quick:
        cases = [cases[6], cases[1]]  # float64 and float32, frozen and uneven, each number of micro-batches
    problems = list(PROBLEMS) if args.problem == "all" else args.problem.split(",")
    options = OPTIONS if args.option == "all" else args.option.split(",")
    work = [(problem, options, cases) for problem in problems]
    if args.option == "all" and world_size % 2 == 0:
        work.append(("top1", FAULTY, cases[-2:]))
    return work


def compare_here(work: Work, ctx: Context) -> Outcomes:
    """Called on every rank."""
    return [
        (problem, outcome)
        for problem, options, cases in work
        for outcome in harness.check_here([option(name) for name in options], cases, PROBLEMS[problem], ctx)
    ]


def on_a_rank(work: Work) -> Outcomes:
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        return compare_here(work, ctx)


def compare(args: argparse.Namespace) -> Outcomes:
    """On the ranks that torchrun or srun started, else on CPU ranks started here."""
    if dist.read_launch().launcher != "python":
        with dist.session(args.device) as ctx:
            return compare_here(plan(ctx.world_size, args), ctx)
    found: Outcomes = []
    for count in sorted(set(args.ranks)):
        env = {"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
        found += ranks.values(ranks.run_ranks(on_a_rank, count, plan(count, args), timeout_s=1200, env=env))[0]
    return found


def named(outcome: Outcome) -> bool:
    """Is what the harness says of a planted fault that fault, and nothing but it?"""
    if outcome.strategy.endswith(FAULTS[0]):  # every expert and nothing else, by the size of a group
        return (
            bool(outcome.factors)
            and all(".experts." in name and abs(f - 2) < 1e-4 for name, f in outcome.factors.items())
            and outcome.factors.keys() == set(outcome.wrong)
        )
    return outcome.failures == ["norm"]


def check_flags(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: there is no such problem or option, or too many ranks.
    """
    if unknown := set(args.problem.split(",")) - {"all", *PROBLEMS}:
        raise script.UserError(f"no problem {sorted(unknown)[0]!r}; one of {', '.join(PROBLEMS)}")
    for name in [] if args.option == "all" else args.option.split(","):
        option(name)
    if max(args.ranks) > 8:
        raise script.UserError(f"--ranks {max(args.ranks)} is more than this is made for; take 1 to 8")


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--problem", default="all", help=f"all, or of: {', '.join(PROBLEMS)}")
    parser.add_argument("--option", default="all", help="all, or ep1+zero0 to ep4+zero2, comma separated")
    parser.add_argument("--ranks", type=whole_numbers, default=[2, 4], help="how many, comma separated")
    parser.add_argument("--accumulation", type=whole_numbers, default=[1, 4], help="micro-batches a step")
    parser.add_argument("--quick", action="store_true", help="two cases instead of eight")
    args = parser.parse_args(argv)
    check_flags(args)
    script.start(__file__, args)
    outcomes = compare(args)
    planted = [o for _, o in outcomes if o.strategy in FAULTY] if args.option == "all" else []
    healthy = [(problem, o) for problem, o in outcomes if o not in planted]
    done = [o for _, o in healthy if not o.skipped]
    if not done:
        raise script.UserError(f"nothing was compared ({healthy[0][1].skipped}); take other --ranks")
    if dist.read_launch().rank == 0:
        for problem in dict.fromkeys(problem for problem, _ in healthy):
            mine = [o for of, o in healthy if of == problem and not o.skipped]
            print(f"{problem}\n{matrix(mine)}")
            print(explain(mine), end="\n" * any(not o.ok for o in mine))
        for o in planted:
            print(f"planted, {o.case.ranks} ranks, {o.case.dtype}: {o.strategy}: {o.diagnosis()}")
    wrong = [o for o in done if not o.ok]
    result = {
        "problems": len({problem for problem, _ in healthy}),
        **fsdp_parity.summary([o for _, o in healthy]),
        "faults_planted": len(planted),
        "faults_named": sum(named(o) for o in planted),
        "deepspeeds_norm_error": max((o.norm_error for o in planted if o.strategy.endswith(FAULTS[1])), default=None),
    }
    if wrong:
        raise script.CheckFailed(f"{len(wrong)} of {len(done)} comparisons differ from one process", result)
    if missed := [o for o in planted if not named(o)]:
        raise script.CheckFailed(
            f"{missed[0].strategy} was not named: {missed[0].diagnosis() or 'found right'}", result
        )
    return result


if __name__ == "__main__":
    script.run(main)

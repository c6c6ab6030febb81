"""Is it the same computation? The training step of train_ddp.py with each of its options, against one process.

You learn   how to hold an option against a reference before it is trusted; that compile, buckets and hooks change how
            a gradient comes about and not what it is
Laptop      python -m ch03_ddp.parity
One         python -m ch03_ddp.parity --option compile --ranks 2
GPU node    torchrun --standalone --nproc-per-node=gpu -m ch03_ddp.parity
Cluster     srun python -m ch03_ddp.parity
You see     chapter 2's table, one row an option: the largest relative error of any gradient, about 1e-15 in float64 and
            1e-6 in float32

In each cell the worst of: accumulation 1 and 4, tied and untied embeddings, all parameters trained and some frozen,
a whole last batch and one that does not divide by the ranks. Rows are ragged: the ranks hold unequal numbers of tokens.
"""

from __future__ import annotations

from dataclasses import replace

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.harness import TOLERANCE, Outcome
from ch02_hardware_parallelism.parity import explain, matrix, whole_numbers
from ch03_ddp.strategies import OPTIONS, RaggedLlama
from common import dist, script


def compare(args, options: list[str]) -> list[Outcome]:
    """On the ranks that torchrun or srun started, else on CPU ranks started here. A strategy is named by its option."""
    launch = dist.read_launch()
    ranks = args.ranks if launch.launcher == "python" else [launch.world_size]
    cases = harness.all_cases(ranks, args.accumulation, list(TOLERANCE), by_hand=False)
    classes = [OPTIONS[name] for name in options]
    if launch.launcher == "python":
        found = harness.check(classes, cases, problem=RaggedLlama(), timeout_s=1200)
    else:
        with dist.session(args.device) as ctx:
            found = harness.check_here(classes, cases, RaggedLlama(), ctx)
    option_of = {OPTIONS[name].__name__: name for name in options}
    return [replace(outcome, strategy=option_of[outcome.strategy]) for outcome in found]


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--option", default="all", help=f"all, or of: {', '.join(OPTIONS)}")
    parser.add_argument(
        "--ranks", type=whole_numbers, default=[2, 4], help="comma separated; under torchrun or srun: theirs"
    )
    parser.add_argument("--accumulation", type=whole_numbers, default=[1, 4], help="micro-batches a step")
    args = parser.parse_args(argv)
    options = list(OPTIONS) if args.option == "all" else args.option.split(",")
    if unknown := [name for name in options if name not in OPTIONS]:
        raise script.UserError(f"no option {unknown[0]!r}; one of {', '.join(OPTIONS)}")
    if max(args.ranks) > 8:
        raise script.UserError(f"--ranks {max(args.ranks)} is more than this is made for; take 1 to 8")
    script.start(__file__, args)
    outcomes = compare(args, options)
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    if dist.read_launch().rank == 0:
        print(matrix(outcomes))
        if notes := explain(outcomes):
            print(notes)
    result = {
        "options": len(options),
        "compared": len(outcomes),
        "wrong": len(wrong),
        **{f"largest_error_{d}": max(o.gradient_error for o in outcomes if o.case.dtype == d) for d in TOLERANCE},
    }
    if wrong:
        raise script.CheckFailed(f"{len(wrong)} of {len(outcomes)} comparisons differ from one process", result)
    return result


if __name__ == "__main__":
    script.run(main)

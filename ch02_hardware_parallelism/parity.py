"""The parity matrix: every strategy against one process, on gradients to ten digits, in every setting that breaks them.

You learn   that a loss curve proves nothing (museum.py), and what does: each gradient, the global norm, the weights
Laptop      python -m ch02_hardware_parallelism.parity
One         python -m ch02_hardware_parallelism.parity --strategy zero-1 --ranks 3 --accumulation 4
A bug       python -m ch02_hardware_parallelism.parity --fault unscaled-pipeline-loss
GPU node    torchrun --standalone --nproc-per-node=gpu -m ch02_hardware_parallelism.parity
Cluster     srun python -m ch02_hardware_parallelism.parity
You see     a table of the largest relative errors, about 1e-15 in float64 and 1e-6 in float32, whether the bytes on
            the wire are those of the formula, and exit code 0; with a planted bug the same table, what is wrong in
            words, and exit code 1

In each cell the worst of all combinations of: accumulation 1 and 4, tied and untied embeddings, all parameters trained
and some frozen, a whole last batch and a smaller one that does not divide by the ranks.
"""

from __future__ import annotations

import argparse
import time

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.bugs import BUGS, find_bug
from ch02_hardware_parallelism.harness import STRATEGIES, TOLERANCE, Case, Outcome, Problem
from common import dist, script
from common.logs import get_logger

log = get_logger()


def matrix(outcomes: list[Outcome]) -> str:
    """Strategies by ranks: the largest gradient error of all cases in float64 and in float32; and whether the bytes
    that were counted are, in all cases, exactly those of the strategy's formula."""
    ranks = sorted({o.case.ranks for o in outcomes})
    names = list(dict.fromkeys(o.strategy for o in outcomes))
    width = max(map(len, names)) + 2
    is_counted = any(o.bytes_exact is not None for o in outcomes)
    lines = [" " * width + "".join(f"{f'{n} ranks':^28}" for n in ranks) + "cases" + "   bytes" * is_counted]
    lines.append(" " * width + "".join(f"{'float64':>12}{'float32':>10}{'':6}" for _ in ranks))
    for name in names:
        row, mine = name.ljust(width), [o for o in outcomes if o.strategy == name]
        for n in ranks:
            here = [o for o in mine if o.case.ranks == n]
            done = [o for o in here if not o.skipped]
            for dtype, room in (("float64", 12), ("float32", 10)):
                errors = [o.gradient_error for o in done if o.case.dtype == dtype]
                row += f"{max(errors):{room}.1e}" if errors else f"{'-':>{room}}"
            row += f"{'ok' if all(o.ok for o in done) else 'WRONG':>6}" if done else f"{'':6}"
        counted = [o.bytes_exact for o in mine if o.bytes_exact is not None]
        exact = ("exact" if all(counted) else "WRONG") if counted else "-"
        lines.append(row + f"{sum(not o.skipped for o in mine):5}" + f"{exact:>8}" * is_counted)
    return "\n".join(lines)


def explain(outcomes: list[Outcome]) -> str:
    """What is wrong and what does not apply, each thing once."""
    lines: dict[str, str] = {}
    for o in outcomes:
        if o.skipped or not o.ok:
            text = f"{o.strategy}: {'skipped: ' if o.skipped else 'WRONG: '}{o.diagnosis()}"
            k = o.case
            settings = [f"{k.ranks} ranks", f"accumulation {k.accumulation}", k.dtype, "tied" if k.tied else "untied"]
            settings += ["frozen"] * k.frozen + ["uneven"] * k.uneven
            lines.setdefault(f"{text.split('off by')[0]}", text + ("" if o.skipped else f"   [{', '.join(settings)}]"))
    for o in outcomes:
        if o.bytes_exact is False:
            text = f"{o.strategy}: WRONG: {o.wire_bytes:,} bytes sent, by formula {o.wire_bytes_formula:,}"
            lines.setdefault(f"{o.strategy} bytes", text)
    return "\n".join(list(lines.values())[:12])


def run_cases(strategies: list, cases: list[Case], device: str) -> list[Outcome]:
    """On the ranks that torchrun or srun started, else on CPU ranks started here."""
    if dist.read_launch().launcher == "python":
        outcomes = []
        for ranks in sorted({case.ranks for case in cases}):
            begin = time.monotonic()
            outcomes += harness.check(strategies, [case for case in cases if case.ranks == ranks], timeout_s=1200)
            log.info(f"{ranks} ranks compared", seconds=round(time.monotonic() - begin))
        return outcomes
    with dist.session(device) as ctx:
        return harness.check_here(strategies, cases, Problem(), ctx)


def whole_numbers(text: str) -> list[int]:
    return [script.at_least(1)(part) for part in text.split(",")]


def chosen(args: argparse.Namespace) -> list:
    """Strategies to check: by name, or the one with a planted bug.

    Raises:
        UserError: no such strategy or bug; the line lists them. Or both are given.
    """
    if args.fault is not None and args.strategy:
        raise script.UserError("--fault has its own strategy; leave out --strategy")
    if args.fault is not None:
        return [find_bug(args.fault).broken]
    names = list(STRATEGIES) if args.strategy in (None, "all") else args.strategy.split(",")
    for name in names:
        harness.resolve(name)
    return names


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--strategy", help=f"all (the default), or of: {', '.join(STRATEGIES)}")
    parser.add_argument("--ranks", type=whole_numbers, default=[2, 3, 4], help="how many, comma separated")
    parser.add_argument("--accumulation", type=whole_numbers, default=[1, 4], help="micro-batches a step")
    parser.add_argument("--dtype", choices=("both", *TOLERANCE), default="both")
    parser.add_argument("--fault", metavar="NAME", help=f"a planted bug: {', '.join(BUGS)}")
    parser.add_argument("--library", action="store_true", help="the library's collectives instead of those by hand")
    args = parser.parse_args(argv)
    strategies, launch = chosen(args), dist.read_launch()
    if max(args.ranks) > 8:
        raise script.UserError(f"--ranks {max(args.ranks)} is more than this is made for; take 1 to 8")
    if launch.launcher != "python":
        args.ranks = [launch.world_size]
    script.start(__file__, args)
    dtypes = list(TOLERANCE) if args.dtype == "both" else [args.dtype]
    cases = harness.all_cases(args.ranks, args.accumulation, dtypes, by_hand=not args.library)
    outcomes = run_cases(strategies, cases, args.device)
    done = [o for o in outcomes if not o.skipped]
    wrong = [o for o in done if not o.ok]
    counted = [o.bytes_exact for o in done if o.bytes_exact is not None]
    if launch.rank == 0:
        print(matrix(outcomes))
        if notes := explain(outcomes):
            print(notes)
    result = {
        "strategies": len({o.strategy for o in done}),
        "compared": len(done),
        "wrong": len(wrong),
        "skipped": len(outcomes) - len(done),
        **{
            f"largest_error_{d}": max((o.gradient_error for o in done if o.case.dtype == d), default=None)
            for d in dtypes
        },
        "bytes_compared": len(counted),
        "bytes_exact": all(counted) if counted else None,
        "caught": bool(wrong) if args.fault else None,
    }
    if wrong:
        raise script.CheckFailed(f"{len(wrong)} of {len(done)} comparisons differ from one process", result)
    if not done:
        raise script.UserError(f"nothing was compared ({outcomes[0].skipped}); take other --ranks")
    if not all(counted) and not args.fault:  # a bug may send more
        different = counted.count(False)
        raise script.CheckFailed(f"{different} of {len(counted)} sent other bytes than their formula says", result)
    if args.fault:
        raise script.CheckFailed(f"the bug {args.fault} was not found in these settings; take others", result)
    return result


if __name__ == "__main__":
    script.run(main)

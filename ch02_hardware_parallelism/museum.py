"""The bug museum: wrong gradients that train. The loss curve looks right; the parity harness names each one.

You learn   why "the loss goes down" proves nothing, and what a comparison of gradients says within a second
Laptop      python ch02_hardware_parallelism/museum.py
One         python ch02_hardware_parallelism/museum.py --bug sum-instead-of-mean --steps 200
GPU node    the same: the museum trains on CPU ranks that it starts itself, as parity bugs do not depend on the device
You see     for each bug the final loss beside the spread of healthy seeds (one process trains those), then what the
            harness says about it; a plot of all curves, among which you will not find the wrong ones
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.bugs import BUGS, find_bug
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.data_parallel import DataParallel
from ch02_hardware_parallelism.harness import Case
from ch02_hardware_parallelism.model import build
from ch02_hardware_parallelism.strategy import Strategy
from ch02_hardware_parallelism.training import Text, adamw, flags, shape_of
from common import dist, ranks, script

HealthyCurves = dict[int, list[list[float]]]  # by batch size, one curve a seed
SMALLEST_BATCH = 4  # the most ranks that share it out, and the chunks of a pipeline
TAIL = 10  # steps whose mean is the final loss
FEWEST_STEPS = 30  # healthy runs have learned something by then
LEAST_FALL = 0.5  # nats by which the loss of a run that learns has fallen


def curve(make: type[Strategy], args: argparse.Namespace) -> list[float]:
    """The losses of a training by `make` with AdamW and clipping, as people train. Called on every rank."""
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        strategy = make(build(shape_of(args), seed=args.seed), Comm(), adamw(args.lr))
        text, losses = Text(args, ctx.device), []
        for _ in range(args.steps):
            losses.append(strategy.backward(text.step()).item())
            strategy.clip(1.0)
            strategy.update()
        strategy.close()
        return losses


@dataclass(frozen=True)
class Exhibit:
    """What was seen of one bug."""

    name: str
    broken: list[float]
    healthy: list[list[float]]  # one curve a seed; the broken one has the first one's seed
    verdict: str  # of the harness; empty if it found nothing

    @property
    def loss(self) -> float:
        return final(self.broken)

    @property
    def spread(self) -> tuple[float, float]:
        ends = [final(losses) for losses in self.healthy]
        return min(ends), max(ends)

    @property
    def curve_tells(self) -> bool:
        """Somebody who knows how far healthy seeds lie apart would have noticed: the loss is above all of them by more
        than their spread, or did not fall."""
        low, high = self.spread
        return not self.loss <= high + (high - low) or not self.loss < self.broken[0] - LEAST_FALL


def final(losses: list[float]) -> float:
    return statistics.mean(losses[-TAIL:])


def visit(name: str, args: argparse.Namespace, healthy: HealthyCurves) -> Exhibit:
    """Train with the bug, and let the harness look at it. `healthy` keeps healthy curves from one bug to the next.

    One process trains the healthy ones, for that is what every healthy strategy computes (parity.py).
    """
    bug = find_bug(name)
    batch = args.batch_size - (bug.uneven and args.batch_size % bug.ranks == 0)

    def train(make: type[Strategy], seed: int, count: int) -> list[float]:
        own = argparse.Namespace(**{**vars(args), "seed": seed, "batch_size": batch})
        return ranks.values(ranks.run_ranks(curve, count, make, own, timeout_s=300))[0]

    if batch not in healthy:
        healthy[batch] = [train(DataParallel, args.seed + number, 1) for number in range(args.seeds)]
    broken = train(bug.broken, args.seed, bug.ranks)
    cases = [Case(bug.ranks, accumulation=4, uneven=uneven) for uneven in (False, True)]
    found = [outcome.diagnosis() for outcome in harness.check([bug.broken], cases) if not outcome.ok]
    plainest = min(found, key=lambda text: ("times" not in text, len(text)), default="")  # a factor says most
    return Exhibit(name, broken, healthy[batch], plainest)


def draw(exhibits: list[Exhibit], run: script.Run) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(exhibits))
    rows = -(-len(exhibits) // columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(3.6 * columns, 2.4 * rows),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axes in grid.flat[len(exhibits) :]:
        axes.axis("off")
    for axes, exhibit in zip(grid.flat, exhibits, strict=False):
        for losses in exhibit.healthy:
            axes.plot(losses, color="#9aa7b4", linewidth=0.9)
        axes.plot(exhibit.broken, color="#b3541e", linewidth=1.2)
        axes.set_title(exhibit.name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Loss by step: healthy seeds (grey) and the bug (red)", fontsize=10)
    figure.savefig(run.path("museum.png"), dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = flags(__doc__)
    parser.set_defaults(steps=60, width=64, layers=2, vocab=512, seq_len=32, accumulation=2, lr=2e-3)
    parser.add_argument("--bug", default="all", help=f"all, or one of: {', '.join(BUGS)}")
    parser.add_argument("--seeds", type=script.at_least(2), default=4, help="healthy runs to know the spread by")
    args = parser.parse_args(argv)
    names = list(BUGS) if args.bug == "all" else args.bug.split(",")
    for name in names:
        find_bug(name)
    if dist.read_launch().launcher != "python":
        raise script.UserError("the museum starts its own ranks; start it with plain python")
    if args.device == "cuda":
        raise script.UserError("the museum trains on CPU ranks; leave out --device cuda")
    if args.steps < FEWEST_STEPS:
        raise script.UserError(f"--steps {args.steps} is no loss curve to judge by; take {FEWEST_STEPS} or more")
    if args.batch_size < SMALLEST_BATCH:
        raise script.UserError(
            f"--batch-size {args.batch_size} is less than the bugs need; take {SMALLEST_BATCH} or more"
        )
    model = build(shape_of(args))
    for name in names:
        bug = find_bug(name)
        if reason := bug.healthy.why_not(model, bug.ranks):
            raise script.UserError(f"{name}: {reason}")
    run = script.start(__file__, args)
    ranks.preload("ch02_hardware_parallelism.museum")  # some sixty ranks are started
    healthy: HealthyCurves = {}
    exhibits = []
    for name in names:
        exhibit = visit(name, args, healthy)
        exhibits.append(exhibit)
        low, high = exhibit.spread
        print(f"{name}: {find_bug(name).story}")
        print(f"    loss curve: ends at {exhibit.loss:.3f}, healthy seeds at {low:.3f} to {high:.3f}", end="")
        print(": it tells" if exhibit.curve_tells else ": nothing to see")
        print(f"    harness:    {exhibit.verdict or 'found NOTHING'}", flush=True)
    draw(exhibits, run)
    caught = sum(bool(exhibit.verdict) for exhibit in exhibits)
    result = {
        "bugs": len(exhibits),
        "caught_by_harness": caught,
        "caught_by_loss_curve": sum(exhibit.curve_tells for exhibit in exhibits),
        **{f"loss_of_{e.name.replace('-', '_')}": e.loss for e in exhibits},
        "healthy_loss_spread": max(high - low for low, high in (e.spread for e in exhibits)),
    }
    if caught < len(exhibits):
        raise script.CheckFailed(f"the harness missed {len(exhibits) - caught} of {len(exhibits)} bugs", result)
    return result


if __name__ == "__main__":
    script.run(main)

"""Communication patterns drawn from what really happened: the messages of a run, recorded, ordered and replayed.

You learn   who sends which chunk to whom in which round, for broadcast, scatter, gather, all-gather, reduce-scatter,
            all-to-all and five kinds of all-reduce; how logical clocks put the events of several ranks in order
Laptop      python ch02_hardware_parallelism/patterns.py --collective all_reduce-ring --ranks 4
Look at     --collective all_reduce-tree, all_reduce-halving_doubling, all_to_all, ... and --ranks 3, 5, 6, 8
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/patterns.py --collective all_gather
Cluster     srun python ch02_hardware_parallelism/patterns.py --collective all_reduce-hierarchical    (one task a GPU)
You see     a line a round, and in the run folder: panels.png, animation.gif (columns are ranks, rows the chunks of
            their buffers, stripes the ranks whose contributions are in), traffic.png (bytes and time). The replay of
            the recording ends where the collective promises to end: nothing is missing from the picture.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as td

from ch02_hardware_parallelism import allreduce
from ch02_hardware_parallelism.journal import Held, Journal, Story, replay
from ch02_hardware_parallelism.messages import Peers
from ch02_hardware_parallelism.patterns_by_hand import PATTERNS, Pattern
from common import dist, ranks, script

NUMBERS_A_KIB = 128  # float64
Recording = tuple[Journal, list[Held]]  # one rank's, and what the real numbers say each cell of it holds afterwards


def tallies(x: torch.Tensor, cells: int, ranks: int) -> torch.Tensor:
    """The end of each cell of a buffer [cells * numbers], as counters [cell, rank, that rank's cell].

    A number for each contribution that there is, which sums count: no two mixtures of contributions look alike.
    """
    return x.view(cells, -1)[:, -ranks * cells :].unflatten(1, (ranks, cells))


def own_contributions(rank: int, cells: int, ranks: int, chunk_kib: int) -> torch.Tensor:
    """The buffer that a rank starts with [cells * numbers]: zeros, and a 1 in each cell where it counts itself."""
    x = torch.zeros(cells * chunk_kib * NUMBERS_A_KIB, dtype=torch.float64)
    tallies(x, cells, ranks)[:, rank].fill_diagonal_(1)
    return x


def found_in(x: torch.Tensor, cells: int, ranks: int) -> list[Held]:
    """Whose contributions each cell of the buffer holds, and how many times."""
    held: list[Held] = [Counter() for _ in range(cells)]
    counts = tallies(x.cpu(), cells, ranks)
    for cell, rank, source in counts.nonzero().tolist():
        held[cell][rank, source] = counts[cell, rank, source].item()
    return held


def record(pattern: Pattern, chunk_kib: int, ctx: dist.Context) -> Recording:
    """Run the pattern on this rank with an open journal."""
    cells, ranks = pattern.cells(ctx.world_size), ctx.world_size
    start = own_contributions(ctx.rank, cells, ranks, chunk_kib).to(ctx.device)
    for _ in range(2):  # the first time opens the connections: not in the picture
        x = start.clone()
        with Journal(x) as journal:
            td.barrier()
            pattern.run(x, Peers(journal=journal))
    td.barrier()
    return journal, found_in(x, cells, ranks)


def record_all(name: str, order: list[int] | None, chunk_kib: int, device: str) -> list[Recording]:
    """On every rank. The recordings of all, on rank 0."""
    with dist.session(device, timeout_s=120, threads=1) as ctx:
        return ctx.gather(record(in_order(PATTERNS[name], order), chunk_kib, ctx))


def in_order(pattern: Pattern, order: list[int] | None) -> Pattern:
    """The same with the ring's ranks in this order."""
    return replace(pattern, run=functools.partial(allreduce.ring, order=order)) if order else pattern


def told(pattern: Pattern, recordings: list[Recording], chunk_kib: int) -> Story:
    return replay([journal for journal, _ in recordings], cell_bytes=chunk_kib * 1024, starts=pattern.starts)


def broken_promises(pattern: Pattern, after: Sequence[Sequence[Held]]) -> list[str]:
    """The cells, of all ranks after a run or its replay, that do not hold what they should."""
    return [
        f"rank {rank} cell {cell} holds {dict(held)}"
        for rank, row in enumerate(after)
        for cell, held in enumerate(row)
        if pattern.promise(rank, cell, len(after)) not in (None, held)
    ]


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument(
        "--collective", choices=PATTERNS, default="all_reduce-ring", metavar="NAME", help=", ".join(PATTERNS)
    )
    parser.add_argument("--ranks", type=script.at_least(1), default=4, help="to start, where no launcher has")
    order = script.comma_list(script.at_least(0))
    parser.add_argument("--order", type=order, help="of the ranks around the ring, as in 0,2,1,3")
    parser.add_argument("--chunk-kib", type=script.at_least(1), default=64, help="bytes of each cell in the pictures")
    parser.add_argument("--no-gif", action="store_true", help="draw no animation, which takes some seconds")
    args = parser.parse_args(argv)
    launch = dist.read_launch()
    if args.ranks > 64:
        raise script.UserError(f"--ranks {args.ranks} would start as many processes here; take up to 64")
    size = args.ranks if launch.launcher == "python" else launch.world_size
    if args.order and args.collective != "all_reduce-ring":
        raise script.UserError(f"{args.collective} is no ring; drop --order, or take all_reduce-ring")
    if args.order and sorted(args.order) != list(range(size)):
        raise script.UserError(f"--order {args.order} is not a permutation; name each of the {size} ranks once")
    pattern, job = PATTERNS[args.collective], (args.collective, args.order, args.chunk_kib, args.device)
    least_kib = -(-size * pattern.cells(size) // NUMBERS_A_KIB)
    if args.chunk_kib < least_kib:
        raise script.UserError(
            f"--chunk-kib {args.chunk_kib} has no room to count what {size} ranks contribute; take {least_kib} or more"
        )
    run = script.start(__file__, args)
    if launch.launcher == "python":
        recordings = ranks.values(ranks.run_ranks(record_all, args.ranks, *job))[0]
    else:
        recordings = record_all(*job)
    if not recordings:
        return {}  # not rank 0
    try:
        story = told(pattern, recordings, args.chunk_kib)
    except ValueError as error:
        raise script.CheckFailed(f"the recording cannot be replayed: {error}", {"replay_matches": False}) from None
    print(f"{args.collective} over {len(recordings)} ranks, {args.chunk_kib} KiB a chunk")
    for number in range(1, story.rounds + 1):
        sent = [message for message in story.messages if message.round == number]
        arrows = "  ".join(f"{m.source}→{m.target} [{chunks(m.cells)}]" for m in sent)
        print(f"  round {number}: {arrows}")
    from ch02_hardware_parallelism import patterns_drawn

    patterns_drawn.panels(story, args.collective, run.path("panels.png"))
    patterns_drawn.traffic(story, args.collective, run.path("traffic.png"))
    if not args.no_gif:
        patterns_drawn.animation(story, args.collective, run.path("animation.gif"))
    print(f"drawn in {run.folder}")
    differs = broken_promises(pattern, story.states[-1])
    wrong = broken_promises(pattern, [held for _, held in recordings])
    result = {
        "collective": args.collective,
        "world_size": len(recordings),
        "rounds": story.rounds,
        "messages": len(story.messages),
        "bytes": sum(message.bytes for message in story.messages),
        "replay_matches": not differs,
        "values_match": not wrong,
    }
    if differs or wrong:
        raise script.CheckFailed(f"{args.collective} went wrong: {'; '.join((differs + wrong)[:5])}", result)
    return result


def chunks(cells: tuple[int, ...]) -> str:
    """(2, 3, 4) -> 2-4."""
    return str(cells[0]) if len(cells) == 1 else f"{cells[0]}-{cells[-1]}"


if __name__ == "__main__":
    script.run(main)

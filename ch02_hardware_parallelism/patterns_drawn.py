"""Pictures of a replayed collective: its rounds as panels or as an animation, its traffic, and its messages in time."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import colormaps, pyplot
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from ch02_hardware_parallelism.journal import Held, Message, Story

WIDTH, GAP = 1.0, 0.8  # of a rank's column, and between two
INK, EMPTY = "#22303c", "#f1f3f5"


def colour(rank: int) -> tuple[float, ...]:
    """Ten that are told apart, then again from the start."""
    return colormaps["tab10"](rank % 10)


def draw_cell(axes: Axes, x: float, y: float, held: Held, ranks: int, sums: bool) -> None:
    """A stripe for each rank whose contribution is in; without sums the whole cell, and the name of what it holds."""
    axes.add_patch(Rectangle((x, y), WIDTH, 0.86, facecolor=EMPTY, edgecolor="none"))
    if sums:
        for rank in {rank for rank, _ in held}:
            axes.add_patch(Rectangle((x + WIDTH * rank / ranks, y), WIDTH / ranks, 0.86, facecolor=colour(rank)))
    elif held:
        ((rank, cell),) = held
        axes.add_patch(Rectangle((x, y), WIDTH, 0.86, facecolor=colour(rank)))
        text = f"{rank}.{cell}"
        axes.text(x + WIDTH / 2, y + 0.43, text, ha="center", va="center", color="white", fontsize=8, weight="bold")
    twice = any(times > 1 for times in held.values())  # a contribution that is in more than once is a mistake
    edge = ("crimson", 2.5) if twice else (INK, 1.4) if sums and len(held) == ranks else ("white", 0.5)
    axes.add_patch(Rectangle((x, y), WIDTH, 0.86, fill=False, edgecolor=edge[0], linewidth=edge[1]))


def draw_message(axes: Axes, message: Message, cells: int) -> None:
    """From the middle of the cells that are sent to the same ones of the receiver."""
    y = cells - 1 - sum(message.cells) / len(message.cells) + 0.43
    right = message.target > message.source
    begin = message.source * (WIDTH + GAP) + (WIDTH * 0.8 if right else WIDTH * 0.2)
    end = message.target * (WIDTH + GAP) + (0 if right else WIDTH)
    far = abs(message.target - message.source) > 1
    style = f"simple,head_length=7,head_width=8,tail_width={1.2 + 2.5 * len(message.cells) / cells:.1f}"
    bend = f"arc3,rad={-0.16 if far and right else 0.16 if far else 0}"
    axes.add_patch(
        FancyArrowPatch((begin, y), (end, y), arrowstyle=style, connectionstyle=bend, facecolor=colour(message.source),
                        edgecolor="white", linewidth=0.7, zorder=5)
    )  # fmt: skip


def draw_round(axes: Axes, story: Story, number: int, *, messages: bool = True) -> None:
    """The state at the end of a round, and the messages that led to it."""
    state = story.states[number]
    ranks, cells = len(state), len(state[0])
    sums = any(len(held) > 1 for state in story.states for row in state for held in row)
    for rank, row in enumerate(state):
        x = rank * (WIDTH + GAP)
        axes.text(
            x + WIDTH / 2, cells + 0.12, f"rank {rank}", ha="center", color=colour(rank), fontsize=9, weight="bold"
        )
        for cell, held in enumerate(row):
            draw_cell(axes, x, cells - 1 - cell, held, ranks, sums)
    sent = [message for message in story.messages if message.round == number]
    for message in sent if messages else ():
        draw_message(axes, message, cells)
    kib = sum(message.bytes for message in sent) / 1024
    title = "start" if number == 0 else f"round {number}: {len(sent)} messages, {kib:.4g} KiB"
    axes.set_title(title.replace("1 messages", "1 message") if len(sent) == 1 else title, fontsize=9.5, color=INK)
    axes.set_xlim(-0.2, ranks * (WIDTH + GAP) - GAP + 0.2)
    axes.set_ylim(-0.25, cells + 0.6)
    axes.axis("off")


def panels(story: Story, name: str, path: Path) -> None:
    """A PNG with a panel a round."""
    count = story.rounds + 1
    ranks, cells = len(story.states[0]), len(story.states[0][0])
    rows = -(-count // max(2, 16 // ranks))
    columns = -(-count // rows)
    size = (columns * (0.75 * ranks + 0.3), rows * (0.42 * min(cells, 12) + 0.75) + 0.55)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number < count:
            draw_round(axes, story, number)
        else:
            axes.axis("off")
    figure.suptitle(f"{name} over {ranks} ranks", fontsize=13, weight="bold", color=INK)
    figure.supxlabel("rows: the chunks of each rank's buffer; colours: whose contributions are in", fontsize=8.5)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def animation(story: Story, name: str, path: Path) -> None:
    """A GIF: each round's messages on the state before it, then the state after it."""
    ranks, cells = len(story.states[0]), len(story.states[0][0])
    figure, axes = pyplot.subplots(figsize=(0.95 * ranks + 0.8, 0.5 * min(cells, 12) + 1.1), layout="constrained")
    figure.suptitle(f"{name} over {ranks} ranks", weight="bold", color=INK)

    def frame(index: int) -> list:
        axes.clear()
        number = (index + 1) // 2
        draw_round(axes, story, number, messages=False)
        if index % 2:  # on its way: what was there before, and the arrows
            axes.clear()
            draw_round(axes, Story(story.messages, [*story.states[:number], story.states[number - 1]]), number)
        return []

    frames = [*range(2 * story.rounds + 1), *[2 * story.rounds] * 2]  # the end stays for a while
    FuncAnimation(figure, frame, frames=frames).save(path, writer=PillowWriter(fps=1.4), dpi=75)
    pyplot.close(figure)


def traffic(story: Story, name: str, path: Path) -> None:
    """A PNG of who sent how much to whom, and of the messages in time: each an arrow from its rank to the other's."""
    table, ranks = story.traffic(), len(story.states[0])
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 0.45 * ranks + 2.4), width_ratios=(1, 2.2), layout="constrained"
    )
    left.imshow(table, cmap="Blues", vmin=0)
    most = max(map(max, table))
    for source, row in enumerate(table):
        for target, size in enumerate(row):
            if size:
                ink = "white" if size > most / 2 else INK
                left.text(target, source, f"{size / 1024:.4g}", ha="center", va="center", color=ink, fontsize=9)
    left.set(xticks=range(ranks), yticks=range(ranks), xlabel="to rank", ylabel="from rank", title="KiB sent")
    start = min((m.begin_s for m in story.messages), default=0.0)
    shade = colormaps["viridis"]
    for message in story.messages:
        begin, end = (message.begin_s - start) * 1e3, (message.end_s - start) * 1e3
        ink = shade(0.9 * (message.round - 1) / max(1, story.rounds - 1))
        arrow = {"arrowstyle": "-|>", "color": ink, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
        right.annotate("", (end, message.target), (begin, message.source), arrowprops=arrow)
        right.plot([begin, end], [message.source, message.target], alpha=0)  # so that the axes make room
    right.hlines(range(ranks), *right.get_xlim(), color="#c8d0d8", lw=5, zorder=0)
    right.set(yticks=range(ranks), ylim=(ranks - 0.5, -0.5), xlabel="ms since the first message", ylabel="rank")
    right.set_title("messages from begin to end, darker in earlier rounds")
    figure.suptitle(f"{name} over {ranks} ranks", weight="bold", color=INK)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

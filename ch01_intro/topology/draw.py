"""Two views of a machine: a text tree with the link matrix, and a PNG with the graph above its matrix."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.script import UserError

from .advise import Advice
from .model import Gpu, Machine, Nic, format_cpu_list, link_rank, nvlinks

# Colour and line width by link kind: the better the path, the darker green and thicker; SYS in red.
STYLE = {
    "NV": ("#1a7f37", 4.5),
    "PIX": ("#1f6feb", 3.2),
    "PXB": ("#54a0ff", 2.6),
    "PHB": ("#d4a106", 2.0),
    "NODE": ("#e07b1a", 1.5),
    "SYS": ("#cf222e", 1.1),
}
MEANING = {
    "NV": "NV# NVLinks",
    "PIX": "PIX one bridge",
    "PXB": "PXB bridges",
    "PHB": "PHB host bridge",
    "NODE": "NODE in a node",
    "SYS": "SYS across nodes",
}
LEGEND = (
    "X itself, NV# = # NVLinks, PIX one PCIe bridge, PXB several, PHB host bridge, NODE within a NUMA node, SYS between"
)


# ---------------------------------------------------------------- text


def text_tree(machine: Machine, advice: Advice) -> str:
    """The machine, its matrix and the advice as plain text, at most about 120 columns wide for 8 GPUs and 10 NICs."""
    lines = [_title(machine)]
    places = _places(machine)
    for n, (title, gpus, nics) in enumerate(places):
        last = n == len(places) - 1
        lines.append(f"{'└' if last else '├'}─ {title}")
        devices = [_gpu_line(machine, gpu) for gpu in gpus] + [_nic_line(nic) for nic in nics]
        for m, device in enumerate(devices):
            lines.append(f"{' ' if last else '│'}  {'└' if m == len(devices) - 1 else '├'}─ {device}")
    if machine.links:
        lines += ["", *_matrix_lines(machine), LEGEND]
    lines += ["", *_advice_lines(machine, advice), "", "Sources"]
    lines += [f"  {name:<17}{state}" for name, state in machine.sources.items()]
    return "\n".join(lines) + "\n"


def _title(machine: Machine) -> str:
    parts = [machine.name]
    if machine.cpu:
        sockets = f"{machine.cpu.sockets} × " if (machine.cpu.sockets or 1) > 1 else ""
        parts.append(f"{sockets}{machine.cpu.model or 'unknown CPU'}")
        parts.append(f"{machine.cpu.cores} cores, {machine.cpu.cpus} CPUs")
    if machine.gpus:
        names = sorted({gpu.name or "unknown model" for gpu in machine.gpus})
        parts.append(f"{len(machine.gpus)} × {', '.join(names)}")
        if len(machine.gpus) > 1:
            parts.append({True: "NVSwitch", False: "no NVSwitch", None: "NVSwitch unknown"}[machine.nvswitch])
        parts.append(f"GPUDirect RDMA: {machine.gpudirect or 'no'}")
    else:
        parts.append("no GPU found")
    return " | ".join(parts)


def _places(machine: Machine) -> list[tuple[str, list[Gpu], list[Nic]]]:
    """(title, GPUs, NICs) by NUMA node; devices whose node is unknown come last, together."""
    places: list[tuple[str, list[Gpu], list[Nic]]] = []
    for node in machine.numa_nodes:
        memory = f", {node.memory_mib / 1024:.0f} GiB" if node.memory_mib else ""
        cpus = f"CPUs {format_cpu_list(node.cpus)}" if node.cpus else "no CPUs"
        gpus = [gpu for gpu in machine.gpus if gpu.numa_node == node.id]
        places.append((f"NUMA {node.id}: {cpus}{memory}", gpus, [n for n in machine.nics if n.numa_node == node.id]))
    known = {node.id for node in machine.numa_nodes}
    gpus = [gpu for gpu in machine.gpus if gpu.numa_node not in known]
    nics = [nic for nic in machine.nics if nic.numa_node not in known]
    if gpus or nics:
        places.append(("NUMA node unknown", gpus, nics))
    return places


def _gpu_line(machine: Machine, gpu: Gpu) -> str:
    memory = f", {gpu.memory_mib / 1024:.0f} GiB" if gpu.memory_mib else ""
    pci = f" at {gpu.pci}" if gpu.pci else ""
    peers = [machine.link(gpu.label, other.label) for other in machine.gpus if other is not gpu]
    best = max((kind for kind in peers if kind), key=link_rank, default=None)
    return f"{gpu.label} {gpu.name or 'unknown model'}{memory}{pci}" + (
        f", {best} to {sum(kind == best for kind in peers)} GPU(s)" if best else ""
    )


def _nic_line(nic: Nic) -> str:
    rate = f" {nic.rate_gbps:g} Gb/s" if nic.rate_gbps else " rate unknown"
    netdev = f", interface {nic.netdev}" if nic.netdev and nic.netdev != nic.name else ""
    return f"{nic.name} {nic.kind}{rate}, {nic.state}" + (f" at {nic.pci}" if nic.pci else "") + netdev


def _columns(machine: Machine) -> list[str]:
    linked = {label for pair in machine.links for label in pair}
    return [gpu.label for gpu in machine.gpus] + [nic.name for nic in machine.nics if nic.name in linked]


def _matrix_lines(machine: Machine) -> Iterator[str]:
    columns = _columns(machine)
    widths = [max(5, len(column) + 1) for column in columns]
    yield "      " + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))
    for gpu in machine.gpus:
        cells = [machine.link(gpu.label, column) or "?" for column in columns]
        yield f"{gpu.label:<6}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _advice_lines(machine: Machine, advice: Advice) -> Iterator[str]:
    yield "Advice"
    if advice.best_group:
        group = " ".join(f"GPU{index}" for index in advice.best_group)
        yield f"  tensor parallel {advice.best_size}: {group}"
    yield f"  {advice.why}"
    for size, groups in advice.groups.items():
        shown = "  ".join("+".join(map(str, group.gpus)) + f" ({group.worst})" for group in groups)
        yield f"  groups of {size}: {shown}"
    for rank in advice.ranks:
        gpu = f"GPU{rank.gpu} " if rank.gpu is not None else ""
        nic = f"{rank.nic} ({rank.nic_link or 'link unknown'}) " if rank.nic else ""
        yield f"  rank {rank.rank}: {gpu}{nic}{rank.command}".rstrip()
    for name, value in advice.env.items():
        yield f'  export {name}="{value}"'
    for warning in advice.warnings:
        yield textwrap.fill(warning, 118, initial_indent="  ! ", subsequent_indent="    ", break_on_hyphens=False)


# ---------------------------------------------------------------- PNG

BOX, GAP, PAD = 1.0, 0.24, 0.3  # device width, gap between devices, padding of a NUMA box, in inches
NIC_Y, GPU_Y, HEIGHT = 1.5, 0.0, 0.62
GROUP_COLOUR = "#1a7f37"


def draw_png(machine: Machine, advice: Advice, path: Path) -> None:
    """Draw NUMA nodes as boxes with NICs above GPUs and the links between them; below it the full link matrix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spans, inner = _layout(machine, advice)
    columns = _columns(machine) if machine.links else []
    low, high = _vertical(machine, spans)
    width = max(inner, 7.5) + 0.6
    foot = 0.5 if machine.links else 0.05
    matrix_height = 0.36 * len(machine.gpus) if columns else 0.0
    matrix_room = matrix_height + 0.45 if columns else 0.0
    height = foot + matrix_room + (high - low) + 0.6
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    graph = figure.add_axes((0, (foot + matrix_room) / height, 1, (high - low) / height))
    graph.set_xlim((inner - width) / 2, (inner + width) / 2)  # one unit is one inch
    graph.set_ylim(low, high)
    graph.axis("off")
    shown = _draw_graph(graph, machine, advice, spans)
    if columns:
        cell = min(0.72, (width - 1.3) / len(columns))
        left = (width - cell * len(columns) + 0.5) / 2
        box = (left / width, foot / height, cell * len(columns) / width, matrix_height / height)
        shown |= _draw_matrix(figure.add_axes(box), machine, columns)
    _draw_legend(figure, shown, bool(advice.best_group))
    parts = _title(machine).split(" | ")
    title = ["   ·   ".join(parts[:3]), "   ·   ".join(parts[3:])]
    figure.suptitle("\n".join(title), fontsize=9, y=1 - 0.12 / height, va="top", linespacing=1.5)
    beside = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(beside, format="png")
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); pass another --run-dir") from None


Span = tuple[str, float, float, dict[str, float]]  # title, left, right, centre of each device by label


def _layout(machine: Machine, advice: Advice) -> tuple[list[Span], float]:
    """NUMA boxes from left to right, each as wide as its longer row of devices; and the width of all.

    NICs stand in the order of the GPUs that use them, so that a GPU with a NIC of its own stands right below it.
    """
    users = {rank.nic: n for n, rank in reversed(list(enumerate(advice.ranks))) if rank.nic}
    spans: list[Span] = []
    left = 0.0
    for title, gpus, nics in _places(machine):
        nics.sort(key=lambda nic: users.get(nic.name, len(users)))
        right = left + max(max(len(gpus), len(nics)) * (BOX + GAP) - GAP, 1.15) + 2 * PAD
        own = gpus and [nic.name for nic in nics[: len(gpus)]] == [r.nic for r in advice.ranks if r.gpu in _ids(gpus)]
        centres = dict(zip([nic.name for nic in nics], _row(left, right, len(nics)), strict=True))
        gpu_row = _row(left, right, len(gpus))
        if own:
            gpu_row = [centres[nic.name] for nic in nics[: len(gpus)]]
        centres.update(zip([gpu.label for gpu in gpus], gpu_row, strict=True))
        spans.append((title, left, right, centres))
        left = right + 0.35
    return spans, max(left - 0.35, 1.0)


def _ids(gpus: list[Gpu]) -> set[int]:
    return {gpu.index for gpu in gpus}


def _row(left: float, right: float, count: int) -> list[float]:
    """Centres of `count` devices, centred in a box."""
    start = (left + right) / 2 - (count * (BOX + GAP) - GAP) / 2 + BOX / 2
    return [start + n * (BOX + GAP) for n in range(count)]


def _vertical(machine: Machine, spans: list[Span]) -> tuple[float, float]:
    """The vertical extent: room below the GPUs for the switch bar or for the longest arc."""
    low = NIC_Y - 0.5
    if machine.gpus:
        low = GPU_Y - 0.4
    if machine.nvswitch:
        low = GPU_Y - 1.45
    elif arcs := _arcs(machine):
        centres = {label: x for *_, of_box in spans for label, x in of_box.items()}
        deepest = max(_arc_depth(_between(machine, centres, pair)) for pair in arcs)
        low = GPU_Y - 0.75 * deepest - 0.25
    return low, NIC_Y + HEIGHT + 0.75


def _arc_depth(gpus_between: int) -> float:
    return 0.75 + 0.62 * gpus_between


def _between(machine: Machine, centres: dict[str, float], pair: tuple[int, int]) -> int:
    """How many GPUs stand between two."""
    a, b = sorted(centres[f"GPU{index}"] for index in pair)
    return sum(a < centres[gpu.label] < b for gpu in machine.gpus)


def _arcs(machine: Machine) -> dict[tuple[int, int], str]:
    """The GPU pairs to join by an arc: all of them for up to four GPUs, else those below one host bridge or better."""
    links = machine.gpu_links()
    return {pair: kind for pair, kind in links.items() if len(links) <= 6 or link_rank(kind) >= link_rank("PHB")}


def _colour(kind: str) -> tuple[str, float]:
    """Colour and width; more NVLinks make a thicker line."""
    if nvlinks(kind):
        return STYLE["NV"][0], 3.4 + 0.1 * min(nvlinks(kind), 18)
    return STYLE[kind]


def _draw_graph(axes: Any, machine: Machine, advice: Advice, spans: list[Span]) -> set[str]:
    """Draw boxes, devices and edges; the link kinds that were drawn."""
    where: dict[str, float] = {}
    bottom, top = (GPU_Y if machine.gpus else NIC_Y) - 0.3, NIC_Y + HEIGHT + 0.7
    for title, left, right, centres in spans:
        _box(axes, left, bottom, right - left, top - bottom, "#f6f8fa", "#8c959f", zorder=0)
        head, _, rest = title.partition(": ")
        middle = (left + right) / 2
        axes.text(middle, top - 0.12, head, ha="center", va="top", fontsize=9, weight="bold", color="#24292f")
        axes.text(middle, top - 0.33, _fit(rest, right - left), ha="center", va="top", fontsize=7.5, color="#57606a")
        where.update(centres)
    shown = _draw_nic_edges(axes, advice, where) | _draw_gpu_edges(axes, machine, where)
    for gpu in machine.gpus:
        memory = f"{gpu.memory_mib / 1024:.0f} GiB" if gpu.memory_mib else ""
        edge = GROUP_COLOUR if gpu.index in advice.best_group else "#8c959f"
        _device(axes, where[gpu.label], GPU_Y, gpu.label, memory, "#d8f5e0", edge)
    for nic in machine.nics:
        rate = f"{nic.rate_gbps:g} Gb/s" if nic.rate_gbps else "rate ?"
        fill = "#ffe3e3" if nic.state == "down" else "#ddeeff" if nic.rdma else "#eeeeee"
        second = f"{nic.kind}\ndown" if nic.state == "down" else f"{nic.kind}\n{rate}"
        _device(axes, where[nic.name], NIC_Y, nic.name, second, fill, "#8c959f")
    return shown


def _box(axes: Any, x: float, y: float, w: float, h: float, fill: str, edge: str, **style: Any) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, facecolor=fill, edgecolor=edge, **style))


def _fit(text: str, width: float) -> str:
    """CPU list and memory on as many lines as the box is wide."""
    if len(text) * 0.058 <= width:
        return text
    return text.replace(", ", ",\n").replace("CPUs ", "CPUs\n", 1) if "CPUs " in text else text


def _device(axes: Any, x: float, y: float, title: str, text: str, fill: str, edge: str) -> None:
    _box(axes, x - BOX / 2, y, BOX, HEIGHT, fill, edge, linewidth=2.2 if edge == GROUP_COLOUR else 1, zorder=3)
    size = 8.5 if len(title) <= 9 else 7.2 if len(title) <= 11 else 6
    axes.text(x, y + HEIGHT - 0.07, title, ha="center", va="top", fontsize=size, weight="bold", zorder=4)
    axes.text(x, y + 0.06, text, ha="center", va="bottom", fontsize=6.5, color="#57606a", zorder=4, linespacing=1.05)


def _draw_nic_edges(axes: Any, advice: Advice, where: dict[str, float]) -> set[str]:
    """From each GPU to the NIC it is advised to use: thick where the path is short. The matrix shows the others."""
    shown = set()
    for rank in advice.ranks:
        if rank.gpu is None or rank.nic is None or rank.nic_link is None:
            continue
        colour, width = _colour(rank.nic_link)
        shown.add("NV" if nvlinks(rank.nic_link) else rank.nic_link)
        ends = [where[f"GPU{rank.gpu}"], where[rank.nic]], [GPU_Y + HEIGHT, NIC_Y]
        axes.plot(*ends, color=colour, linewidth=width, zorder=2, solid_capstyle="round")
        # The label sits near the GPU's end, where no two edges meet.
        x = 0.72 * ends[0][0] + 0.28 * ends[0][1]
        y = 0.72 * ends[1][0] + 0.28 * ends[1][1]
        _tag(axes, x, y, rank.nic_link, colour)
    return shown


def _tag(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.92}
    axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=colour, weight="bold", bbox=box, zorder=5)


def _draw_gpu_edges(axes: Any, machine: Machine, where: dict[str, float]) -> set[str]:
    """An NVSwitch as a bar that every GPU is joined to; otherwise arcs below the GPUs, long ones lower."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    links = machine.gpu_links()
    if not links:
        return set()
    xs = [where[gpu.label] for gpu in machine.gpus]
    if machine.nvswitch:
        colour, width = STYLE["NV"]
        _box(axes, min(xs) - BOX / 2, GPU_Y - 1.3, max(xs) - min(xs) + BOX, 0.4, colour, colour, zorder=3)
        kinds = sorted({kind for kind in links.values() if nvlinks(kind)}, key=link_rank)
        text = f"NVSwitch: {' or '.join(kinds)} between any two GPUs" if len(xs) > 2 else "NVSwitch"
        style = {"ha": "center", "va": "center", "fontsize": 8.5, "color": "white", "weight": "bold", "zorder": 4}
        axes.text((min(xs) + max(xs)) / 2, GPU_Y - 1.1, text, **style)
        for x in xs:
            axes.plot([x, x], [GPU_Y, GPU_Y - 0.92], color=colour, linewidth=width, zorder=2)
        return {"NV"}
    drawn = _arcs(machine)
    for (i, j), kind in sorted(drawn.items(), key=lambda item: link_rank(item[1])):
        colour, width = _colour(kind)
        a, b = sorted((where[f"GPU{i}"], where[f"GPU{j}"]))
        steps = _between(machine, where, (i, j))
        depth = _arc_depth(steps)
        a, b = a + 0.14 + 0.06 * steps, b - 0.14 - 0.06 * steps  # arcs that start at one GPU stay apart
        curve = Curve([(a, GPU_Y), (a, GPU_Y - depth), (b, GPU_Y - depth), (b, GPU_Y)], [1, 4, 4, 4])
        dashes = (0, (4, 2)) if kind == "SYS" else "solid"
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=width, linestyle=dashes, zorder=2))
        _tag(axes, (a + b) / 2, GPU_Y - 0.75 * depth, kind, colour)
    return {"NV" if nvlinks(kind) else kind for kind in drawn.values()}


def _draw_matrix(axes: Any, machine: Machine, columns: list[str]) -> set[str]:
    rows = [gpu.label for gpu in machine.gpus]
    shown = set()
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            kind = machine.link(row, column)
            known = kind not in (None, "X")
            colour = _colour(kind)[0] if known and kind else "#eaeef2"
            if known and kind:
                shown.add("NV" if nvlinks(kind) else kind)
            axes.fill([x + 0.03, x + 0.97, x + 0.97, x + 0.03], [y + 0.05, y + 0.05, y + 0.95, y + 0.95], color=colour)
            text = "white" if known else "#57606a"
            axes.text(x + 0.5, y + 0.52, kind or "?", ha="center", va="center", fontsize=7.5, color=text)
    size = 7 if max(map(len, columns)) <= 10 else 5.8
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, fontsize=size)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows, fontsize=7.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return shown


def _draw_legend(figure: Any, shown: set[str], group: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [kind for kind in STYLE if kind in shown]
    handles: list[Any] = [
        Line2D([], [], color=STYLE[kind][0], linewidth=STYLE[kind][1], label=MEANING[kind]) for kind in kinds
    ]
    if group:
        handles.append(Patch(facecolor="#d8f5e0", edgecolor=GROUP_COLOUR, linewidth=2, label="advised group"))
    if handles:
        style = {"fontsize": 7, "frameon": False, "columnspacing": 1.6, "handlelength": 1.8}
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), **style)

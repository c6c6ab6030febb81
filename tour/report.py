"""The tour's report: one HTML file that holds its plots and needs nothing beside it."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.script import atomic_write

STYLE = """
:root { color-scheme: light dark; --line: #8885; --quiet: #777; --good: #2e7d32; --bad: #b3261e; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 860px; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.6rem; }
.quiet { color: var(--quiet); } .passed { color: var(--good); } .failed { color: var(--bad); }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 6px; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: .4rem 0; }
table { border-collapse: collapse; } td, th { padding: .25rem 1.1rem .25rem 0; text-align: left; }
tr + tr { border-top: 1px solid var(--line); } td.number { font-variant-numeric: tabular-nums; text-align: right; }
"""


@dataclass(frozen=True)
class Chapter:
    """One step of the tour as it went."""

    id: str
    title: str
    says: str
    command: str
    status: str
    seconds: float
    output: str
    note: str = ""
    shown: dict[str, Any] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)


def write(path: Path, chapters: list[Chapter], environment: dict[str, Any]) -> None:
    """Write the report to `path`; the figures go into it."""
    hardware = environment["hardware"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    summary = "".join(
        f'<tr><td><a href="#{c.id}">{_text(c.title)}</a></td><td class="{c.status}">{c.status}</td>'
        f'<td class="number">{c.seconds:.0f} s</td></tr>'
        for c in chapters
    )
    machine = (
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB, {gpus}; Python "
        f"{environment['python']}, torch {environment['versions'].get('torch', '-')}; commit {environment['commit']}; "
        f"{environment['time']}"
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Tour of Modern Distributed AI Systems</title><style>{STYLE}</style></head><body>"
        f'<h1>Modern Distributed AI Systems: the tour</h1><p class="quiet">{_text(machine)}</p><table>{summary}</table>'
        + "".join(_section(chapter) for chapter in chapters)
        + "</body></html>"
    )
    with atomic_write(path) as file:
        file.write(page)


def _section(chapter: Chapter) -> str:
    rows = "".join(
        f'<tr><td>{_text(words)}</td><td class="number">{_text(value)}</td></tr>'
        for words, value in chapter.shown.items()
    )
    pictures = "".join(
        f'<img alt="{_text(figure.stem)} of: {_text(chapter.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()}">'
        for figure in chapter.figures
    )
    failure = f'<p class="failed">{_text(chapter.note)}</p>' if chapter.note else ""
    opened = "" if chapter.figures else " open"  # what a step printed is all there is to see where it drew nothing
    return (
        f'<h2 id="{chapter.id}">{_text(chapter.title)}</h2><p>{_text(chapter.says)}</p>{failure}<table>{rows}</table>'
        f"{pictures}<details{opened}><summary>What it printed</summary><pre>$ {_text(chapter.command)}\n"
        f"{_text(chapter.output)}</pre></details>"
    )


def _text(value: object) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return html.escape(value if isinstance(value, str) else json.dumps(value))

"""The table and the four panels of kv_memory.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"paged": "paged", "known": "length known", "pow2": "power of two", "max": "max_model_len"}
COLORS = ("#1f5c99", "#2e7d32", "#b3541e", "#6a4c93")


def table(measured: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    lines = []
    for name, m in measured.items():
        lines.append(f"{name:<24}{'predicted':>11}{'measured':>11}")
        lines += [
            f"  {key.replace('_', ' '):<22}{m['expected'][key]:>11}{m['found'][key]:>11.0f}" for key in m["expected"]
        ]
        lines.append("  empty of what is taken: " + ", ".join(f"{key} {m['fits'].waste(key):.1%}" for key in NAMES))
        for key, words in (("paged", "paged"), ("pieces", "in one piece")):
            t = m[key]
            lines.append(
                f"  {words:<13} {t.running_mean:6.1f} requests at once (most {t.running_peak}), "
                f"{t.tokens / t.seconds:,.0f} tokens/s, {t.preemptions:.0f} preemptions"
            )
        lines.append("")
    lines.append(f"{'':<6}{'block size':>10}{'empty':>9}{'slots a request':>17}{'(B-1)/2':>9}{'step ms':>9}")
    lines += [
        f"{r['engine']:<6}{r['block_size']:>10}{r['waste']:>9.1%}{r['empty_a_request']:>17.2f}{r['predicted_empty']:>9.1f}{r['step_ms']:>9.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def plot(measured: dict[str, dict[str, Any]], rows: list[dict[str, Any]], decoding: int, path: Path) -> None:
    """Slots over time, requests at once, empty slots by layout, block sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((slots, running), (bars, sizes)) = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    name, m = next(iter(measured.items()))
    at_s = [sample.at_s for sample in m["fits"].samples]
    slots.fill_between(at_s, [sample.held for sample in m["fits"].samples], color="#cccccc", label="tokens held")
    for (key, words), color in zip(NAMES.items(), COLORS, strict=True):
        slots.plot(at_s, [sample.needed[key] for sample in m["fits"].samples], color=color, label=words)
    slots.set(xlabel="s", ylabel="slots", title=f"what the same running requests take ({name})", yscale="log")
    slots.legend(frameon=False, fontsize=8)
    for (name, m), color in zip(measured.items(), COLORS, strict=False):
        for key, style, words in (("paged", "-", "paged"), ("pieces", "--", "in one piece")):
            trace = m[key]
            label = f"{name}, {words}"
            running.step(
                [s.at_s for s in trace.samples], [s.running for s in trace.samples], style, color=color, label=label
            )
    running.set(xlabel="s", ylabel="requests running", title="in the same memory")
    running.legend(frameon=False, fontsize=8)
    width = 0.8 / len(measured)
    for number, ((name, m), color) in enumerate(zip(measured.items(), COLORS, strict=False)):
        at = np.arange(len(NAMES)) + number * width
        drawn = bars.bar(at, [100 * m["fits"].waste(key) for key in NAMES], width, color=color, label=name)
        bars.bar_label(drawn, fmt="%.0f %%", fontsize=8)
    bars.set_xticks(np.arange(len(NAMES)) + width * (len(measured) - 1) / 2, NAMES.values())
    bars.set(ylabel="% of taken slots empty", title="mean over the run")
    bars.legend(frameon=False, fontsize=8)
    right = sizes.twinx()
    for name, color in zip(measured, COLORS, strict=False):
        own = [row for row in rows if row["engine"] == name]
        at = [row["block_size"] for row in own]
        sizes.plot(at, [row["empty_a_request"] for row in own], "o-", color=color, label=f"{name}, empty slots")
        right.plot(at, [row["step_ms"] for row in own], "s--", color=color, label=f"{name}, ms a step")
    at = sorted({row["block_size"] for row in rows})
    sizes.plot(at, [(size - 1) / 2 for size in at], "k:", label="(block size - 1) / 2")
    sizes.set_xscale("log", base=2)
    sizes.set(xlabel="block size", ylabel="slots a request", title="block size: fragmentation and speed")
    sizes.set_xticks(at, map(str, at))
    sizes.legend(frameon=False, fontsize=8, loc="upper left")
    for axis in (sizes, right):  # room for the legends
        axis.set_ylim(0, 1.4 * axis.get_ylim()[1])
    right.set_ylabel(f"ms for a decode step of {decoding}")
    right.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

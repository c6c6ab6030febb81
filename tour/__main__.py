"""make tour: run the book's scripts as a reader would, one after another, and write one report.

The list is tour/steps.toml. Ctrl-C stops whatever is running.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from common import process, script
from common.exercises import gpu_count, unmet
from tour.report import Chapter, write

FIELDS = {"id", "title", "command", "says", "figures", "show", "expect", "timeout_s"}
# torchrun's and the profiler's notes are noise here, and the report has the figures of the RESULT line
NOISE = re.compile(r"RESULT |[WI]\d{4} \d\d:|USDT:")


def load_steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a TOML file.

    Raises:
        UserError: the file cannot be read, or a field is missing or unknown.
    """
    try:
        steps: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["step"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise script.UserError(f"cannot read steps from {path} ({error}); it holds [[step]] tables") from None
    for step in steps:
        if wrong := FIELDS ^ step.keys():
            raise script.UserError(f"{path}: step {step.get('id', '?')} lacks or misnames {', '.join(sorted(wrong))}")
    return steps


def run_step(step: dict[str, Any], folder: Path, places: dict[str, str]) -> Chapter:
    """Run one step, showing what it prints as it comes."""
    command = step["command"].format(**places)
    run_dir = folder / step["id"]

    def show(line: str) -> None:
        if not NOISE.match(line):
            print(f"  {line}", flush=True)

    done = process.run(
        [*shlex.split(command), "--run-dir", str(run_dir)], timeout_s=step["timeout_s"], on_line=show, on_error=show
    )
    result = done.result if done.returncode == 0 else None
    note = done.reason(step["timeout_s"]) if result is None else ""
    if result is not None:
        absent = [name for name in step["figures"] if not (run_dir / name).exists()]
        absent += [name for name in step["show"] if name not in result]
        note = f"it ran, but gave no {', '.join(absent)}" if absent else "; ".join(unmet(step["expect"], result))
    return Chapter(
        id=step["id"],
        title=step["title"],
        says=step["says"],
        command=command,
        status="failed" if note else "passed",
        seconds=done.seconds,
        output=done.stdout[-20000:] + (done.stderr[-8000:] if note else ""),
        note=note,
        shown={words: result.get(name) for name, words in step["show"].items()} if result else {},
        figures=[run_dir / name for name in step["figures"] if (run_dir / name).exists()],
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make tour", description=__doc__)
    parser.add_argument("--steps", type=Path, default=Path(__file__).with_name("steps.toml"), help="another list")
    parser.add_argument("--only", help="run only the steps with these ids, comma separated")
    parser.add_argument("--out", type=Path, help="folder for everything (default: runs/tour/TIME)")
    args = parser.parse_args(argv)
    steps = load_steps(args.steps)
    if args.only is not None:
        wanted = args.only.split(",")
        if unknown := set(wanted) - {step["id"] for step in steps}:
            raise script.UserError(
                f"no step {', '.join(sorted(unknown))}; steps are {', '.join(s['id'] for s in steps)}"
            )
        steps = [step for step in steps if step["id"] in wanted]
    folder = (args.out or process.ROOT / "runs" / "tour" / time.strftime("%Y%m%d-%H%M%S")).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise script.UserError(f"cannot write to {folder} ({error.strerror}); pass another --out") from None
    places = {"tour": shlex.quote(str(folder)), "two_ranks": "cpu" if gpu_count() == 1 else "auto"}

    print(f"The tour has {len(steps)} steps and takes under five minutes on two cores. Ctrl-C stops it.", flush=True)
    chapters: list[Chapter] = []
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step['title']}\n  $ {step['command'].format(**places)}", flush=True)
        chapters.append(run_step(step, folder, places))
        shown = {words: value for words, value in chapters[-1].shown.items() if value is not None}
        facts = ", ".join(f"{words} {json.dumps(value)}" for words, value in shown.items())
        print(f"  {chapters[-1].status} in {chapters[-1].seconds:.0f} s: {chapters[-1].note or facts}", flush=True)
        if chapters[-1].status == "failed":
            break
    report = folder / "report.html"
    write(report, chapters, script.environment())
    failed = [c.title for c in chapters if c.status == "failed"]
    total = sum(c.seconds for c in chapters)
    print(f"\n{'stopped at a failure' if failed else 'done'} after {total:.0f} s; the report:\n{report}", flush=True)
    return 1 if failed else 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGHUP: the terminal was closed
        signal.signal(number, _interrupt)
    try:
        sys.exit(main())
    except script.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; everything that was started has been stopped", file=sys.stderr)
        sys.exit(130)

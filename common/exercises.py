"""The manifest of the chapters' exercises: list them, run one as the book prints it, smoke-test them all.

    python -m common.exercises list
    python -m common.exercises run ch01 baseline
    python -m common.exercises smoke [ch01_intro [baseline]] [--gpu] [--json FILE] [--junit FILE]

`smoke` runs each exercise's smoke command (its gpu command with --gpu), checks `expect` against its RESULT line, and
ends with a table: passed, failed, or skipped with what it would need. Two run at a time, as ranks wait as much as they
compute; those that measure time (`alone`) come last, one by one, and so do GPU commands. `run` shows the command's
output, and checks `run_expect`: what only the whole exercise can hold, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import process
from common.bootstrap import ENGINES, control_plane, engine_environment
from common.script import UserError, atomic_write, gpu_names, usable_cores

ROOT = process.ROOT
REQUIRED = {"id", "covers", "title", "script", "run", "smoke", "needs", "expect"}
OPTIONAL = {"gpu", "gpu_needs", "gpu_expect", "run_expect", "timeout_s", "alone"}
AT_A_TIME = 2
BESIDE_OTHERS = {"OMP_WAIT_POLICY": "passive"}  # two that spin on shared cores: 10 x slower
EXPECTATIONS = ("expect", "gpu_expect", "run_expect")
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


@dataclass(frozen=True)
class Exercise:
    """One [[exercise]] of a chapter's exercises.toml; the fields are described in CONTRIBUTING.md."""

    chapter: str
    id: str
    title: str
    script: str
    run: str
    smoke: str
    covers: list[str]
    needs: list[str]
    expect: dict[str, str]
    gpu: str = ""
    gpu_needs: list[str] = field(default_factory=list)
    gpu_expect: dict[str, str] = field(default_factory=dict)
    run_expect: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 300
    alone: bool = False


def chapters(root: Path = ROOT) -> list[Path]:
    """Chapter folders that have a manifest, in the book's order."""
    return sorted(path.parent for path in root.glob("ch*/exercises.toml"))


def load(chapter: Path) -> list[Exercise]:
    """Read and check one chapter's manifest.

    Raises:
        UserError: malformed TOML, a missing or unknown field, a wrong type, a double id, a script that does not exist,
            an unknown need, or an expectation that cannot be read or met.
    """
    path = chapter / "exercises.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML ({error}); fix that line") from None
    if unknown := document.keys() - {"exercise"}:
        raise UserError(f"{path}: unknown table {', '.join(sorted(unknown))}; it holds [[exercise]] entries only")
    entries = document.get("exercise")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no [[exercise]]; add one, see CONTRIBUTING.md")
    found: list[Exercise] = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise UserError(f"{path} has {entry!r} for an exercise; write [[exercise]] tables, see CONTRIBUTING.md")
        exercise = _checked(chapter, path, entry)
        if exercise.id in {other.id for other in found}:
            raise UserError(f"{path}: two exercises have the id {exercise.id}; ids are unique in a chapter")
        found.append(exercise)
    return found


def _checked(chapter: Path, path: Path, entry: dict[str, Any]) -> Exercise:
    where = f"{path}: exercise {entry.get('id', '?')}"
    if missing := REQUIRED - entry.keys():
        raise UserError(f"{where} lacks {', '.join(sorted(missing))}; see CONTRIBUTING.md")
    if unknown := entry.keys() - REQUIRED - OPTIONAL:
        raise UserError(f"{where} has the unknown field {', '.join(sorted(unknown))}; fields are in CONTRIBUTING.md")
    for name, value in entry.items():
        if name in ("covers", "needs", "gpu_needs"):
            kind, right = "list of strings", isinstance(value, list) and all(isinstance(v, str) for v in value)
        elif name in EXPECTATIONS:
            kind, right = "table", isinstance(value, dict)
        elif name == "alone":
            kind, right = "true or false", isinstance(value, bool)
        elif name == "timeout_s":
            kind, right = "positive number", isinstance(value, int | float) and value is not True and value > 0
        else:
            kind, right = "non-empty string", isinstance(value, str) and value != ""
        if not right:
            raise UserError(f"{where}: {name} must be a {kind}, not {value!r}; see CONTRIBUTING.md")
        if name in ("run", "smoke", "gpu"):
            _split_command(f"{where}: {name}", value)
    if not (chapter.parent / entry["script"]).is_file():
        raise UserError(f"{where}: script {entry['script']} does not exist; paths start at the repository's root")
    if not entry["expect"]:
        raise UserError(f"{where} expects nothing; name at least one RESULT field and what it must be")
    for need in [*entry["needs"], *entry.get("gpu_needs", [])]:
        try:
            missing_for(need)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    for name in EXPECTATIONS:
        for key, wanted in entry.get(name, {}).items():
            parse_expectation(f"{where}: {name}.{key}", wanted)
    return Exercise(chapter=chapter.name, **entry)


def _split_command(where: str, command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"{where} is {command!r} ({error}); quote it as a shell would") from None


def parse_expectation(where: str, text: object) -> list[tuple[str, Any]]:
    """`"> 0.5, < 6"` to [(">", 0.5), ("<", 6)]. Values are JSON: numbers, true, false, null, "strings".

    Raises:
        UserError: it cannot be read, or no value can meet it.
    """
    if not isinstance(text, str):
        raise UserError(f'{where} is {text!r}; write a string such as "> 0.5"')
    parts: list[tuple[str, Any]] = []
    decoder, rest = json.JSONDecoder(parse_constant=_not_json), text
    while not parts or rest:
        match = re.match(r"\s*(==|!=|<=|>=|<|>)\s*", rest)
        try:
            value, end = decoder.raw_decode(rest, match.end() if match else 0)
        except ValueError:
            match, end = None, 0
        following = re.match(r"\s*(,(?=.)|$)", rest[end:])
        if match is None or following is None:
            raise UserError(f'{where} is {text!r}; write a comparison with a JSON value, such as "> 0.5" or "== true"')
        if match[1] not in ("==", "!=") and not _is_number(value):
            raise UserError(f"{where} is {text!r}; only numbers can be ordered")
        parts.append((match[1], value))
        rest = rest[end + following.end() :]
    if not _can_be_met(parts):
        raise UserError(f"{where} is {text!r}, which no value can meet; correct the bounds")
    return parts


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _can_be_met(parts: list[tuple[str, Any]]) -> bool:
    """Try every value that could decide it: those named, and one between, below and above each."""
    numbers = sorted({v for _, v in parts if _is_number(v)})
    between = [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    candidates: list[Any] = [v for _, v in parts] + between + ["another value"]
    candidates += [numbers[0] - 1, numbers[-1] + 1] if numbers else []
    return any(all(_holds(value, *part) for part in parts) for value in candidates)


def _holds(value: Any, comparison: str, wanted: Any) -> bool:
    if comparison not in ("==", "!=") and not _is_number(value):
        return False
    if isinstance(value, bool) != isinstance(wanted, bool):  # in Python True == 1; in a RESULT it is not
        return comparison == "!="
    return COMPARISONS[comparison](value, wanted)


def unmet(expect: dict[str, str], result: dict[str, Any]) -> list[str]:
    """What `result` does not fulfil, one line each."""
    problems = []
    for key, text in expect.items():
        if key not in result:
            problems.append(f"RESULT has no {key}")
        elif not all(_holds(result[key], *part) for part in parse_expectation(key, text)):
            problems.append(f"{key} is {json.dumps(result[key])}, expected {text}")
    return problems


def gpu_count() -> int:
    """NVIDIA GPUs that may be used here."""
    return len(gpu_names())


PROGRAMS = {
    "redis": "redis-server", "prometheus": "prometheus", "docker": "docker", "nginx": "nginx",
    "nsys": "nsys",
}  # fmt: skip
SLURM = ("munged", "slurmctld", "slurmd", "srun")  # for a cluster of one's own on this machine


def missing_for(need: str) -> str:
    """What this machine lacks for `need`, or "" if it is there.

    Raises:
        UserError: no such need is known.
    """
    if match := re.fullmatch(r"(gpus?|cores|memory_gib)(?:>=(\d+))?", need):
        kind, count = match[1], int(match[2] or 1)
        if kind.startswith("gpu"):
            have = gpu_count()
        else:
            pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
            have = usable_cores() if kind == "cores" else pages
        return "" if have >= count else f"{need.replace('>=', ' >= ')} (here {have})"
    if need == "root":
        return "" if os.geteuid() == 0 else "root"
    if need == "netns":
        return _namespaces_missing()
    if need == "slurm":
        lacking = [name for name in SLURM if not shutil.which(name, path=_system_path())]
        return f"{', '.join(lacking)} (make system-deps)" if lacking else ""
    if need == "aio":
        return "" if _compiles("#include <libaio.h>") else "g++ and libaio's header (make system-deps)"
    if need in PROGRAMS:
        return "" if shutil.which(PROGRAMS[need]) else f"{PROGRAMS[need]} (make system-deps)"
    if need in ENGINES:
        made = (engine_environment(need) / ".installed").exists()
        return "" if made else f"the {need} environment (make setup-{need})"
    if need == "kubectl":
        return "" if shutil.which("kubectl") else "kubectl 1.27 or newer (kubernetes.io/docs/tasks/tools)"
    if need == "kube":
        return "" if (control_plane() / "bin").is_dir() else "a Kubernetes control plane (make setup-kube)"
    known = [
        "gpu", "gpus>=N", "cores>=N", "memory_gib>=N", "root", "netns", "slurm", "aio", "kube", "kubectl", *PROGRAMS,
        *ENGINES,
    ]  # fmt: skip
    raise UserError(f"unknown need {need!r}; known are {', '.join(known)}")


def _compiles(source: str) -> bool:
    """Whether there is a C++ compiler, and it finds what this line includes."""
    if not shutil.which("g++"):
        return False
    command = ["g++", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def _system_path() -> str:
    """PATH with the folders of system administration, which users often lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


@functools.cache
def _namespaces_missing() -> str:
    """Whether networks of our own can be made here: tried, as the reasons against it are many."""
    path = _system_path()
    if missing := [tool for tool in ("unshare", "ip", "tc") if not shutil.which(tool, path=path)]:
        return f"{' and '.join(missing)} (Linux, make system-deps)"
    trial = ["--net", "ip", "link", "add", "one", "type", "veth", "peer", "name", "two"]
    for rights in ([], ["--user", "--map-root-user"]):
        done = subprocess.run(["unshare", *rights, *trial], env={**os.environ, "PATH": path}, capture_output=True)
        if done.returncode == 0:
            return ""
    return "network namespaces (root, or user namespaces switched on)"


@dataclass(frozen=True)
class Outcome:
    """How one exercise went. status: passed, failed or skipped; note: why, or what it would need."""

    chapter: str
    id: str
    status: str
    seconds: float = 0.0
    note: str = ""
    command: str = ""
    result: dict[str, Any] | None = None
    output: str = ""


def smoke(exercise: Exercise, *, gpu: bool = False) -> Outcome:
    """Run one exercise's smoke (or gpu) command and hold its RESULT against what is expected."""
    (outcome,) = smoke_all([exercise], gpu, lambda _: None)
    return outcome


def _begin(exercise: Exercise, gpu: bool) -> process.Child | Outcome:
    """Its command, running; or why it is not."""
    command = exercise.gpu if gpu else exercise.smoke
    needs = [*exercise.needs, *(exercise.gpu_needs or ["gpu"])] if gpu else exercise.needs
    if not command:
        return Outcome(exercise.chapter, exercise.id, "skipped", note="has no gpu command")
    if lacking := [what for need in needs if (what := missing_for(need))]:
        return Outcome(exercise.chapter, exercise.id, "skipped", note="needs " + ", ".join(lacking), command=command)
    try:
        return process.Child(command, env={} if exercise.alone or gpu else BESIDE_OTHERS)
    except OSError as error:
        note = f"cannot start it ({error.strerror}: {error.filename})"
        return Outcome(exercise.chapter, exercise.id, "failed", note=note, command=command)


def _judge(exercise: Exercise, done: process.Finished, gpu: bool) -> Outcome:
    expect = (exercise.gpu_expect or exercise.expect) if gpu else exercise.expect
    note = ""
    if done.timed_out or done.returncode != 0:
        note = done.reason(exercise.timeout_s)
    elif done.result is None:
        note = "the last line of stdout is not RESULT {...}"
    elif problems := unmet(expect, done.result):
        note = "; ".join(problems)
    status, output = ("failed", done.stdout[-8000:] + done.stderr[-8000:]) if note else ("passed", "")
    command = exercise.gpu if gpu else exercise.smoke
    return Outcome(exercise.chapter, exercise.id, status, round(done.seconds, 1), note, command, done.result, output)


def smoke_all(exercises: list[Exercise], gpu: bool, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Outcomes in the order of `exercises`; each is told when it is there."""
    order = sorted(exercises, key=lambda exercise: exercise.alone)
    found: dict[tuple[str, str], Outcome] = {}
    running: list[tuple[Exercise, process.Child]] = []

    def add(outcome: Outcome) -> None:
        found[outcome.chapter, outcome.id] = outcome
        tell(outcome)

    def make_room(at_a_time: int) -> None:
        """Wait until fewer than that many run."""
        while len(running) >= at_a_time:
            for exercise, child in running.copy():
                left = child.started + exercise.timeout_s - time.monotonic()
                if child.process.poll() is not None or left <= 0:
                    done = child.wait(max(0.0, left))
                    running.remove((exercise, child))
                    add(_judge(exercise, done, gpu))
            time.sleep(0.02)

    try:
        for exercise in order:
            make_room(1 if exercise.alone or gpu else min(AT_A_TIME, usable_cores()))
            begun = _begin(exercise, gpu)
            if isinstance(begun, Outcome):
                add(begun)
            else:
                running.append((exercise, begun))
        make_room(1)
    finally:
        for _, child in running:
            child.stop()
    return [found[exercise.chapter, exercise.id] for exercise in exercises]


def run(exercise: Exercise, *, gpu: bool = False) -> int:
    """Run one exercise as the book prints it, its output shown as it comes, and hold its RESULT against `run_expect`.

    Returns:
        The command's exit code; 1 if it is 0 and the RESULT is not as expected.

    Raises:
        UserError: there is no such command.
    """
    command = exercise.gpu if gpu else exercise.run
    if not command:
        raise UserError(f"{exercise.id} has no gpu command; run it without --gpu")
    show = functools.partial(print, flush=True)
    complain = functools.partial(print, file=sys.stderr, flush=True)
    try:
        done = process.run(command, timeout_s=24 * 3600, on_line=show, on_error=complain)
    except OSError as error:
        raise UserError(f"cannot start {command!r} ({error.strerror}); install what it calls") from None
    problems = [] if gpu or done.returncode else unmet(exercise.run_expect, done.result or {})
    for problem in problems:
        complain(f"failed: {problem}")
    return done.returncode or int(bool(problems))


def select(chapter: str | None, exercise_id: str | None, root: Path = ROOT) -> list[Exercise]:
    """All exercises, one chapter's (`ch01` will do), or one."""
    folders = chapters(root)
    if chapter:
        matching = [f for f in folders if f.name == chapter or f.name.split("_")[0] == chapter]
        if not matching:
            raise UserError(f"no chapter {chapter}; one of {', '.join(f.name for f in folders)}")
        folders = matching
    found = [exercise for folder in folders for exercise in load(folder)]
    if not found:
        raise UserError(f"no exercises in {root}; a chapter lists its own in exercises.toml")
    if exercise_id:
        chosen = [exercise for exercise in found if exercise.id == exercise_id]
        if not chosen:
            raise UserError(f"no exercise {exercise_id}; one of {', '.join(e.id for e in found)}")
        return chosen
    return found


def write_junit(path: Path, outcomes: list[Outcome]) -> None:
    count = {status: str(sum(o.status == status for o in outcomes)) for status in ("failed", "skipped")}
    suite = ElementTree.Element(
        "testsuite", name="smoke", tests=str(len(outcomes)), failures=count["failed"], skipped=count["skipped"]
    )
    for o in outcomes:
        case = ElementTree.SubElement(suite, "testcase", classname=o.chapter, name=o.id, time=str(o.seconds))
        if o.status != "passed":
            tag = "failure" if o.status == "failed" else "skipped"
            ElementTree.SubElement(case, tag, message=o.note).text = _xml_safe(o.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        ElementTree.ElementTree(suite).write(file, encoding="utf-8", xml_declaration=True)


def _xml_safe(text: str) -> str:
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def _table(exercises: list[Exercise], gpu: bool) -> list[Outcome]:
    width = max(len(f"{e.chapter} {e.id}") for e in exercises)

    def tell(outcome: Outcome) -> None:
        name = f"{outcome.chapter} {outcome.id}".ljust(width)
        print(f"{outcome.status:8} {name} {outcome.seconds:6.1f} s  {outcome.note}".rstrip(), flush=True)
        if outcome.status == "failed":
            print(f"  {outcome.command}\n{outcome.output}", file=sys.stderr, flush=True)

    outcomes = smoke_all(exercises, gpu, tell)
    counts = {status: sum(o.status == status for o in outcomes) for status in ("passed", "failed", "skipped")}
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return outcomes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common.exercises", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "run", "smoke"))
    parser.add_argument("chapter", nargs="?", help="ch01 or ch01_intro")
    parser.add_argument("id", nargs="?", help="one exercise of that chapter")
    parser.add_argument("--gpu", action="store_true", help="the commands for a GPU machine")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    parser.add_argument("--junit", type=Path, help="write a JUnit report there")
    args = parser.parse_args(argv)
    try:
        exercises = select(args.chapter, args.id)
        if args.action == "list":
            for e in exercises:
                print(f"{e.chapter:26} {e.id:22} {','.join(e.covers):12} {e.title}\n{'':27}{e.run}")
            return 0
        if args.action == "run":
            if not args.id:
                raise UserError("run takes a chapter and an exercise id; see `list`")
            return run(exercises[0], gpu=args.gpu)
        outcomes = _table(exercises, args.gpu)
        try:
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(args.json) as file:
                    json.dump([asdict(o) for o in outcomes], file, indent=2)
            if args.junit:
                write_junit(args.junit, outcomes)
        except OSError as error:
            raise UserError(f"cannot write {error.filename} ({error.strerror}); name another file") from None
        if args.gpu and all(o.status == "skipped" for o in outcomes):
            raise UserError("no GPU command was run; see the reasons above, and run it on a GPU machine")
        return 1 if any(o.status == "failed" for o in outcomes) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

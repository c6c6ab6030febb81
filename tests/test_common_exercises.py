"""The manifest refuses what is wrong in it, and smoke tells passed from failed from skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import exercises, process
from common.exercises import load, parse_expectation, select, unmet
from common.script import UserError

ROOT = Path(__file__).resolve().parents[1]
GOOD = {
    "id": "one", "covers": ["e01"], "title": "One", "script": "ch01_fake/ok.py", "run": "python ch01_fake/ok.py",
    "smoke": "python ch01_fake/ok.py", "needs": [], "expect": {"value": "== 1"},
}  # fmt: skip


def toml(*entries: dict[str, Any]) -> str:
    """The entries as [[exercise]] tables; JSON's strings, numbers and lists are also TOML's."""

    def value(v: Any) -> str:
        if isinstance(v, dict):
            return "{ " + ", ".join(f"{json.dumps(k)} = {value(x)}" for k, x in v.items()) + " }"
        return json.dumps(v)

    return "\n".join("[[exercise]]\n" + "\n".join(f"{k} = {value(v)}" for k, v in e.items()) for e in entries)


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    folder = tmp_path / "ch01_fake"
    folder.mkdir()
    (folder / "ok.py").touch()
    return folder


def refused(chapter: Path, text: str | bytes) -> str:
    (chapter / "exercises.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load(chapter)
    line = str(caught.value)
    assert "exercises.toml" in line
    assert ";" in line
    assert "\n" not in line
    return line


# ---------------------------------------------------------------- the manifest


def test_a_good_manifest(chapter: Path) -> None:
    (chapter / "exercises.toml").write_text(toml(GOOD, GOOD | {"id": "two", "gpu": "x", "timeout_s": 9.5}))
    one, two = load(chapter)
    assert (one.chapter, one.id, one.covers) == ("ch01_fake", "one", ["e01"])
    assert (one.expect, one.timeout_s) == ({"value": "== 1"}, 300)
    assert (two.id, two.gpu, two.timeout_s) == ("two", "x", 9.5)
    assert exercises.smoke(replace(two, gpu_needs=["gpus>=999"]), gpu=True).note.startswith("needs gpus >= 999")
    assert exercises.chapters(chapter.parent) == [chapter]
    assert [e.id for e in select("ch01", None, chapter.parent)] == ["one", "two"]
    assert [e.id for e in select("ch01_fake", "two", chapter.parent)] == ["two"]
    with pytest.raises(UserError, match="no chapter ch02; one of ch01_fake"):
        select("ch02", None, chapter.parent)
    with pytest.raises(UserError, match="no exercise three; one of one, two"):
        select("ch01", "three", chapter.parent)


def test_no_manifest_at_all_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exercises"):
        select(None, None, tmp_path)


@pytest.mark.parametrize("text", ["[[exercise]\n", "id = ", b"\xff\xfe", 'a = "1"\na = "2"'])
def test_malformed_toml(chapter: Path, text: str | bytes) -> None:
    assert "not valid TOML" in refused(chapter, text)


@pytest.mark.parametrize("text", ["", "exercise = []", 'exercise = "x"', "[exercise]\nid = 1", "exercise = [1]"])
def test_no_exercise_in_it(chapter: Path, text: str) -> None:
    assert "[[exercise]]" in refused(chapter, text)


def test_unknown_table(chapter: Path) -> None:
    assert "unknown table exercises" in refused(chapter, toml(GOOD).replace("[[exercise]]", "[[exercises]]"))


@pytest.mark.parametrize("name", sorted(exercises.REQUIRED))
def test_missing_field(chapter: Path, name: str) -> None:
    assert f"lacks {name}" in refused(chapter, toml({k: v for k, v in GOOD.items() if k != name}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"expects": {}}, "unknown field expects"),
        ({"id": 3}, "id must be"),
        ({"id": ""}, "id must be"),
        ({"covers": "e01"}, "covers must be"),
        ({"covers": [1]}, "covers must be"),
        ({"needs": [2]}, "needs must be"),
        ({"expect": "== 1"}, "expect must be"),
        ({"expect": {}}, "expects nothing"),
        ({"run": ["python"]}, "run must be"),
        ({"timeout_s": "60"}, "timeout_s must be"),
        ({"timeout_s": True}, "timeout_s must be"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"alone": 1}, "alone must be"),
        ({"script": "ch01_fake/none.py"}, "ch01_fake/none.py does not exist"),
        ({"needs": ["gpu", "tpu"]}, "unknown need 'tpu'"),
        ({"needs": ["gpu >= 2"]}, "unknown need 'gpu >= 2'"),
        ({"smoke": 'python -c "1'}, "smoke"),
        ({"expect": {"value": 1}}, "expect.value"),
        ({"expect": {"value": "1"}}, "expect.value"),
        ({"expect": {"value": "=< 1"}}, "expect.value"),
        ({"expect": {"value": "> 1 < 3"}}, "expect.value"),
        ({"expect": {"value": "> 5, < 3"}}, "no value can meet"),
        ({"gpu_expect": {"value": "> x"}}, "gpu_expect.value"),
        ({"run_expect": "> 1"}, "run_expect must be"),
        ({"run_expect": {"value": "> 5, < 3"}}, "no value can meet"),
    ],
)
def test_wrong_field(chapter: Path, change: dict[str, Any], named: str) -> None:
    line = refused(chapter, toml(GOOD | change))
    assert named in line


def test_double_id(chapter: Path) -> None:
    assert "two exercises have the id one" in refused(chapter, toml(GOOD, GOOD))


# ---------------------------------------------------------------- expectations


@pytest.mark.parametrize(
    "text",
    ["", " ", "5", "> ", "== 'x'", "> true", "< null", '> "a"', "== nan", "== NaN", "< Infinity", "> 1,", ", > 1",
     "> 1 > 2", "==", "=== 1", "> 1; < 2"],
)  # fmt: skip
def test_unreadable_expectations(text: str) -> None:
    with pytest.raises(UserError, match="here"):
        parse_expectation("here", text)


@pytest.mark.parametrize(
    "text",
    ["> 5, < 3", "== 1, == 2", "> 5, <= 5", "== 1, != 1", "== true, == 1", "== true, == false", "== null, > 1",
     '== "a", == "b"', "== 5, > 5", "!= 3, == 3.0", ">= 2, < 2"],
)  # fmt: skip
def test_contradictory_expectations(text: str) -> None:
    with pytest.raises(UserError, match="no value can meet"):
        parse_expectation("here", text)


@pytest.mark.parametrize(
    ("text", "meets", "fails"),
    [
        ("== 1", [1, 1.0], [True, "1", None, 2, [1]]),
        ("== true", [True], [1, 1.0, "true", False, None]),
        ("!= true", [False, 1, None, "true"], [True]),
        ("== null", [None], [0, False, "", "null"]),
        ("!= null", [0, False, ""], [None]),
        ('== "gloo"', ["gloo"], ["nccl", None, 1]),
        ('== "a, b"', ["a, b"], ["a", "b"]),
        ('!= "", != "x"', ["y"], ["", "x"]),
        ("> 5", [5.1, 6], [5, True, None, "6", [6]]),
        ("> 0, < 1", [0.5], [0, 1, True, False]),
        (">= 5, <= 5", [5, 5.0], [4.9, 5.1]),
        ("> -1.5e-3,<2", [0, 1.9], [-0.0015, 2]),
        ("== [1, 2]", [[1, 2]], [[2, 1], [1], 1]),
        ("!= 3, > 2, < 4", [2.5, 3.5], [3, 2, 4]),
    ],
)
def test_what_an_expectation_means(text: str, meets: list[Any], fails: list[Any]) -> None:
    for value in meets:
        assert unmet({"v": text}, {"v": value}) == [], value
    for value in fails:
        assert unmet({"v": text}, {"v": value}) == [f"v is {json.dumps(value)}, expected {text}"]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from(["<", "<="]), st.sampled_from([">", ">="]))
def test_bounds_are_refused_only_when_empty(low: float, high: float, below: str, above: str) -> None:
    empty = low > high or (low == high and (below, above) != ("<=", ">="))
    middle = (low + high) / 2
    if not empty and low < high and not low < middle < high:
        return  # neighbouring floats
    try:
        parse_expectation("here", f"{above} {low!r}, {below} {high!r}")
        readable = True
    except UserError:
        readable = False
    assert readable != empty


def test_a_field_that_result_lacks() -> None:
    assert unmet({"a": "> 1", "b": "== 2"}, {"b": 3}) == ["RESULT has no a", "b is 3, expected == 2"]


# ---------------------------------------------------------------- needs


def test_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exercises, "gpu_count", lambda: 1)
    assert exercises.missing_for("gpu") == ""
    assert exercises.missing_for("gpus>=2") == "gpus >= 2 (here 1)"
    assert exercises.missing_for("cores>=1") == ""
    assert "here" in exercises.missing_for("cores>=100000")
    assert "here" in exercises.missing_for("memory_gib>=1000000")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "srun" in exercises.missing_for("slurm")
    for program in exercises.SLURM:
        (tmp_path / program).touch(0o755)
    assert exercises.missing_for("slurm") == ""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "make setup-vllm" in exercises.missing_for("vllm")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert exercises.missing_for("root") == "root"
    with pytest.raises(UserError, match=r"unknown need 'abacus'; known are gpu, .*slurm.*vllm"):
        exercises.missing_for("abacus")


# ---------------------------------------------------------------- smoke, in a small house of its own

SLEEPER = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]]
"""
FAKES = {
    "ok.py": "print('hello')\nprint('RESULT {\"value\": 1}')\n",
    "silent.py": "print('hello')\n",
    "early.py": "print('RESULT {\"value\": 1}')\nprint('and on')\n",
    "crash.py": "import sys\nprint('RESULT {\"value\": 1}')\nsys.exit('error: no luck; try again')\n",
    # a child, one in a session of its own (as torchrun's workers are), and one whose parent has ended
    "hang.py": SLEEPER
    + """
subprocess.Popen(sleep)
subprocess.Popen(sleep, start_new_session=True)
subprocess.run([sys.executable, "-c", f"import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)"])
print("started", flush=True)
time.sleep(600)
""",
    "orphan.py": SLEEPER + "subprocess.Popen(sleep, start_new_session=True)\nprint('RESULT {\"value\": 1}')\n",
    "torch_hang.py": "import os, time\nos.write(1, b'up\\n')\ntime.sleep(600)\n",
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of common beside a chapter of fake exercises: `python -m common.exercises` as it is called, quickly."""
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "ch01_fake").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "ch01_fake" / name).write_text(text)
    return tmp_path


def exercise(script: str, **changes: Any) -> dict[str, Any]:
    name = script.removesuffix(".py")
    command = f"python ch01_fake/{script}"
    return GOOD | {"id": name, "script": f"ch01_fake/{script}", "run": command, "smoke": command} | changes


def cli(house: Path, *args: str, entries: list[dict[str, Any]] | None = None) -> subprocess.CompletedProcess[str]:
    if entries is not None:
        (house / "ch01_fake" / "exercises.toml").write_text(toml(*entries))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "common.exercises", *args]
    return subprocess.run(command, cwd=house, env=env, capture_output=True, text=True, timeout=90)


def alive(mark: str) -> list[psutil.Process]:
    running = (p for p in psutil.process_iter(["cmdline", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE)
    return [process for process in running if mark in (process.info["cmdline"] or [])]


def test_smoke_all_ways_to_end(house: Path) -> None:
    entries = [
        exercise("ok.py"),
        exercise("ok.py", id="wrong-value", expect={"value": "> 1", "other": "== 2"}),
        exercise("silent.py"),
        exercise("early.py"),
        exercise("crash.py"),
        exercise("hang.py", smoke="python ch01_fake/hang.py mark-of-smoke", timeout_s=6),
        exercise("ok.py", id="no-such-command", smoke="no-such-command --x"),
        exercise("ok.py", id="needs-much", needs=["cores>=100000", "memory_gib>=1"]),
    ]
    done = cli(house, "smoke", "--json", "out/smoke.json", "--junit", "out/smoke.xml", entries=entries)
    assert done.returncode == 1, done.stderr
    assert alive("mark-of-smoke") == []
    outcomes = {o["id"]: o for o in json.loads((house / "out/smoke.json").read_text())}
    assert {name: o["status"] for name, o in outcomes.items()} == {
        "ok": "passed", "wrong-value": "failed", "silent": "failed", "early": "failed", "crash": "failed",
        "hang": "failed", "no-such-command": "failed", "needs-much": "skipped",
    }  # fmt: skip
    notes = {name: o["note"] for name, o in outcomes.items()}
    assert notes["ok"] == ""
    assert notes["wrong-value"] == "value is 1, expected > 1; RESULT has no other"
    assert notes["silent"] == notes["early"] == "the last line of stdout is not RESULT {...}"
    assert notes["crash"] == "exit 1: error: no luck; try again"
    assert notes["hang"] == "stopped after 6 s"
    assert "no-such-command" in notes["no-such-command"]
    assert notes["needs-much"].startswith("needs cores >= 100000 (here ")
    assert outcomes["ok"]["result"] == {"value": 1}
    assert "started" in outcomes["hang"]["output"]
    assert "1 passed, 6 failed, 1 skipped" in done.stdout.splitlines()[-1]

    suite = ElementTree.parse(house / "out/smoke.xml").getroot()
    assert {k: suite.get(k) for k in ("tests", "failures", "skipped")} == {
        "tests": "8",
        "failures": "6",
        "skipped": "1",
    }
    cases = {case.get("name"): case for case in suite}
    assert len(cases["ok"]) == 0
    assert cases["crash"].find("failure").get("message") == notes["crash"]  # type: ignore[union-attr]
    assert "no luck" in (cases["crash"].find("failure").text or "")  # type: ignore[union-attr]
    assert cases["needs-much"].find("skipped").get("message") == notes["needs-much"]  # type: ignore[union-attr]


def test_smoke_that_passes_or_is_skipped_ends_with_0(house: Path) -> None:
    entries = [exercise("ok.py"), exercise("orphan.py", smoke="python ch01_fake/orphan.py mark-of-orphan")]
    done = cli(house, "smoke", "ch01", entries=entries)
    assert (done.returncode, done.stderr) == (0, "")
    assert alive("mark-of-orphan") == []  # it ended well, and left a process behind
    gpu = cli(house, "smoke", "ch01", "ok", "--gpu")
    assert gpu.returncode == 2  # a GPU check that runs nothing has not passed
    assert "no GPU command was run" in gpu.stderr
    assert "has no gpu command" in gpu.stdout
    assert "0 passed, 0 failed, 1 skipped" in gpu.stdout


MEET = """
import sys, time
from pathlib import Path
mine, other = map(Path, sys.argv[1:3])
mine.touch()
while not other.exists():
    time.sleep(0.01)
print('RESULT {"value": 1}')
"""


def test_two_run_at_a_time_and_those_that_measure_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others: dict[str, int] = {}  # by exercise, those that ran when it began
    waits: dict[str, str | None] = {}

    class Counted(process.Child):
        born: ClassVar[list[process.Child]] = []

        def __init__(self, command: str, env: dict[str, str]) -> None:
            others[command.split()[-1]] = sum(child.process.poll() is None for child in self.born)
            waits[command.split()[-1]] = env.get("OMP_WAIT_POLICY")
            super().__init__(command, env=env)
            self.born.append(self)

    monkeypatch.setattr(process, "Child", Counted)
    monkeypatch.setattr(exercises, "usable_cores", lambda: 2)
    (tmp_path / "meet.py").write_text(MEET)
    (tmp_path / "ok.py").write_text(FAKES["ok.py"])
    both, alone = [tmp_path / "a", tmp_path / "b"], [tmp_path / "first", tmp_path / "last"]
    plain = exercises.Exercise(chapter="ch01", **GOOD)
    meeting = [
        replace(plain, id=one.name, smoke=f"python {tmp_path}/meet.py {one} {other} {one.name}", timeout_s=60)
        for one, other in (both, both[::-1])
    ]
    first, last = (
        replace(plain, id=path.name, smoke=f"python {tmp_path}/ok.py {path.name}", alone=True) for path in alone
    )
    told: list[str] = []
    found = exercises.smoke_all([first, *meeting, last], False, lambda outcome: told.append(outcome.id))
    assert [(outcome.id, outcome.status) for outcome in found] == [
        ("first", "passed"), ("a", "passed"), ("b", "passed"), ("last", "passed"),
    ]  # fmt: skip
    assert others == {"a": 0, "b": 1, "first": 0, "last": 0}
    assert waits == {"a": "passive", "b": "passive", "first": None, "last": None}
    assert told[2:] == ["first", "last"]


def test_a_timeout_takes_torchruns_workers_along(house: Path) -> None:
    both_up = threading.Barrier(3)
    command = "torchrun --standalone --nproc-per-node=2 ch01_fake/torch_hang.py mark-of-workers"
    waiters = [threading.Thread(target=both_up.wait, args=(60,)) for _ in range(2)]

    def on_line(line: str) -> None:
        assert line == "up"
        waiters.pop().start()

    with process.Child(command, cwd=house, on_line=on_line) as child:
        both_up.wait(60)
        assert len(alive("mark-of-workers")) == 3  # torchrun and two workers
        done = child.wait(0.1)
    assert done.timed_out
    assert alive("mark-of-workers") == []


def test_list_and_run(house: Path) -> None:
    listed = cli(house, "list", entries=[exercise("ok.py"), exercise("crash.py")])
    assert listed.returncode == 0
    assert "python ch01_fake/ok.py" in listed.stdout
    ran = cli(house, "run", "ch01", "ok")
    assert (ran.returncode, ran.stdout) == (0, 'hello\nRESULT {"value": 1}\n')
    failed = cli(house, "run", "ch01", "crash")
    assert failed.returncode == 1
    assert "error: no luck" in failed.stderr


def test_run_alone_holds_the_result_against_run_expect(house: Path) -> None:
    entries = [
        exercise("ok.py", run_expect={"value": "> 1"}),
        exercise("ok.py", id="met", run_expect={"value": "== 1"}),
        exercise("silent.py", run_expect={"value": "== 1"}),
        exercise("crash.py", run_expect={"value": "== 1"}),
    ]
    missed = cli(house, "run", "ch01", "ok", entries=entries)
    assert (missed.returncode, missed.stderr) == (1, "failed: value is 1, expected > 1\n")
    assert missed.stdout.endswith('RESULT {"value": 1}\n')
    assert cli(house, "run", "ch01", "met").returncode == 0
    assert "failed: RESULT has no value" in cli(house, "run", "ch01", "silent").stderr
    assert "failed:" not in cli(house, "run", "ch01", "crash").stderr
    assert cli(house, "smoke", "ch01", "ok").returncode == 0


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("smoke", "ch09"), "no chapter ch09"),
        (("smoke", "ch01", "none"), "no exercise none"),
        (("run",), "run takes a chapter and an exercise id"),
        (("run", "ch01", "ok", "--gpu"), "no gpu command"),
        (("run", "ch01", "gone"), "no-such-command"),
        (("smoke", "ch01", "ok", "--json", "ch01_fake/ok.py/x.json"), "cannot write"),
    ],
)
def test_users_errors_end_with_2(house: Path, args: tuple[str, ...], line: str) -> None:
    done = cli(house, *args, entries=[exercise("ok.py"), exercise("ok.py", id="gone", run="no-such-command")])
    assert done.returncode == 2, done.stderr
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert line in error


def test_no_chapter_has_exercises(house: Path) -> None:
    done = cli(house, "smoke")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no exercises")

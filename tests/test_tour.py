"""The tour: its report holds everything, a failure stops it and is told, Ctrl-C leaves nothing running."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import psutil
import pytest

from common.process import ROOT
from tour.__main__ import load_steps

DRAW = """
import base64, json, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "dot.png").write_bytes(base64.b64decode("{dot}"))
print("<b>bold</b>")
print("RESULT " + json.dumps({{"speed": 12.5, "nothing": None}}))
"""
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def steps_file(
    folder: Path, *commands: str, figures: str = '["dot.png"]', show: str = '{ speed = "km/h" }', expect: str = "{}"
) -> Path:
    (folder / "draw.py").write_text(DRAW.format(dot=DOT))
    blocks = [
        f'[[step]]\nid = "s{i}"\ntitle = "Step {i} & more"\ncommand = "{command}"\nsays = "words"\n'
        f"figures = {figures}\nshow = {show}\nexpect = {expect}\ntimeout_s = 60\n"
        for i, command in enumerate(commands)
    ]
    path = folder / "steps.toml"
    path.write_text("\n".join(blocks))
    return path


def tour(steps: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tour", "--steps", str(steps), "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_report_is_one_file_that_holds_its_plots(tmp_path: Path) -> None:
    done = tour(steps_file(tmp_path, f"python {tmp_path}/draw.py"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])  # printed last
    page = path.read_text()
    assert "Step 0 &amp; more" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page  # what a step prints is text, not markup
    assert "<td>km/h</td>" in page
    assert "12.5" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(p) for p in pictures] == [base64.b64decode(DOT)]
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # nothing outside the file


def test_a_failure_stops_the_tour_and_is_in_the_report(tmp_path: Path) -> None:
    steps = steps_file(tmp_path, "python -c 'import sys; sys.exit(7)'", f"python {tmp_path}/draw.py")
    done = tour(steps, tmp_path / "out")
    assert done.returncode == 1
    assert "[2/2]" not in done.stdout
    assert "exit 7" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("wrong", [{"figures": '["other.png"]'}, {"show": '{ other = "x" }'}])
def test_a_step_that_does_not_give_what_it_should_has_failed(tmp_path: Path, wrong: dict[str, str]) -> None:
    done = tour(steps_file(tmp_path, f"python {tmp_path}/draw.py", **wrong), tmp_path / "out")
    assert done.returncode == 1
    assert "gave no other" in done.stdout


def test_a_result_that_is_not_as_expected_has_failed(tmp_path: Path) -> None:
    done = tour(steps_file(tmp_path, f"python {tmp_path}/draw.py", expect='{ speed = "> 20" }'), tmp_path / "out")
    assert done.returncode == 1
    assert "speed is 12.5, expected > 20" in (tmp_path / "out" / "report.html").read_text().replace("&gt;", ">")


def test_bad_lists_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[[step")
    (tmp_path / "b.toml").write_text('[[step]]\nid = "x"\n')
    for name in ("a.toml", "b.toml", "none.toml"):
        done = tour(tmp_path / name, tmp_path / "out")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_all_that_was_started(tmp_path: Path, number: signal.Signals) -> None:
    """Two ranks under torchrun, which puts them into sessions of their own."""
    (tmp_path / "wait.py").write_text(
        "import os, threading\nos.write(1, b'up %d\\n' % os.getpid())\nthreading.Event().wait()"
    )  # one write a line: print makes several, and the two ranks share a pipe
    steps = steps_file(tmp_path, f"torchrun --standalone --nproc-per-node=2 {tmp_path}/wait.py")
    command = [sys.executable, "-m", "tour", "--steps", str(steps), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        guard = threading.Timer(90, process.kill)
        guard.start()
        assert process.stdout is not None
        ranks = []
        for line in process.stdout:
            if " up " in line:
                ranks.append(int(line.split()[-1]))
            if len(ranks) == 2:
                break
        family = [psutil.Process(pid) for pid in ranks] + psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        try:
            assert process.wait(60) == 130, process.stderr.read() if process.stderr else ""
        finally:
            guard.cancel()
    assert len(ranks) == 2
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_the_list_runs_scripts_that_exist() -> None:
    steps = load_steps(ROOT / "tour" / "steps.toml")
    for step in steps:
        scripts = re.findall(r"\S+\.py", step["command"])
        assert scripts
        assert all((ROOT / name).is_file() for name in scripts)
    assert len({step["id"] for step in steps}) == len(steps)
    assert tomllib.loads((ROOT / "tour" / "steps.toml").read_text())

"""What every script relies on: RESULT, one-line errors, atomic files, logs, child processes, timers and the models."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import lm, logs, process, profiling, script
from common.script import UserError
from tests.spawn import run_ranks

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def python(code: str, *args: str, timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script's text in an interpreter of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=timeout_s
    )


# ---------------------------------------------------------------- RESULT and errors

FIGURES = """
    import sys
    from common import script
    def main():
        args = script.parser("doc").parse_args(sys.argv[1:])
        run = script.start("/somewhere/ch01_x/y.py", args)
        run.log(step=1, loss=float("nan"))
        print("before")
        return {"loss": float("nan"), "rates": [1.5, float("inf")], "deep": {"x": float("-inf")}, "ok": True, "n": None}
    script.run(main)
"""


def strict_json(text: str) -> Any:
    """JSON as browsers read it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_result_is_the_last_line_and_lies_in_the_run_folder(tmp_path: Path) -> None:
    done = python(FIGURES, "--run-dir", str(tmp_path / "run"))
    assert (done.returncode, done.stderr) == (0, "")
    before, result = done.stdout.splitlines()
    assert before == "before"
    expected = {"loss": None, "rates": [1.5, None], "deep": {"x": None}, "ok": True, "n": None}
    assert result.startswith("RESULT ")
    assert strict_json(result[len("RESULT ") :]) == expected
    assert strict_json((tmp_path / "run/result.json").read_text()) == expected
    assert strict_json((tmp_path / "run/metrics.jsonl").read_text()) == {"step": 1, "loss": None}
    env = strict_json((tmp_path / "run/env.json").read_text())
    assert env["command"][-2:] == ["--run-dir", str(tmp_path / "run")]
    assert env["versions"]["torch"] == torch.__version__
    assert env["hardware"]["cores"] == script.usable_cores()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["env.json", "metrics.jsonl", "result.json"]


def test_only_rank_0_reports(tmp_path: Path) -> None:
    done = python(FIGURES, "--run-dir", str(tmp_path / "run"), RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\n", "")
    assert not (tmp_path / "run").exists()


ENDINGS = """
    import os, signal, sys
    from common import script
    def main():
        how = sys.argv[1]
        if how == "user": raise script.UserError("no file x;\\n  make one")
        if how == "flag": script.parser("doc").parse_args(["--sed", "3"])
        if how == "number": script.parser("doc").parse_args(["--seed", "-3"])
        if how == "memory": raise MemoryError()
        if how == "cuda": raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.\\nGPU 0 has ...")
        if how == "bug": raise RuntimeError("shapes differ")
        if how == "torch":
            import torch
            torch.empty(1 << 60)
        if how == "interrupt": os.kill(os.getpid(), signal.SIGINT)
        if how == "folder": script.start(__name__, script.parser("").parse_args(["--run-dir", "/dev/null/x"]))
        return {}
    script.run(main)
"""


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("user", 2, "error: no file x; make one"),
        ("flag", 2, "error: unrecognized arguments: --sed 3; see --help"),
        ("number", 2, "error: argument --seed: -3 is below 0; see --help"),
        ("memory", 2, "error: out of memory (a Python allocation failed); take a smaller --preset, "),
        (
            "cuda",
            2,
            "error: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB.); take a smaller --preset, ",
        ),
        ("torch", 2, "error: out of memory ("),
        ("folder", 2, "error: cannot write to /dev/null/x (Not a directory); pass another --run-dir"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_a_users_error_is_one_line(how: str, code: int, line: str) -> None:
    done = python(ENDINGS, how)
    assert (done.returncode, done.stdout) == (code, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith(line)


def test_a_bug_keeps_its_traceback() -> None:
    done = python(ENDINGS, "bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RESULT" not in done.stdout


@pytest.mark.parametrize("env", [{"RANK": "3", "WORLD_SIZE": "4"}, {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}])
def test_the_line_names_the_rank(env: dict[str, str]) -> None:
    assert python(ENDINGS, "user", **env).stderr == "error [rank 3]: no file x; make one\n"


def test_flags() -> None:
    args = script.parser("What it does.").parse_args(["--device", "cpu", "--seed", "7"])
    assert (args.device, args.seed, args.run_dir, args.all_ranks) == ("cpu", 7, None, False)
    for wrong in (["--seed", "1.5"], ["--device", "tpu"], ["--dev", "cpu"]):
        with pytest.raises(UserError, match="see --help"):
            script.parser("").parse_args(wrong)
    for text in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(Exception, match="number"):
            script.positive(text)
    assert script.positive("2e-3") == 0.002


def test_seed_everything_repeats() -> None:
    import random

    draws = []
    for seed in (5, 5, 6, 2**40):
        script.seed_everything(seed)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_comma_lists() -> None:
    numbers = script.comma_list(script.at_least(1))
    assert (numbers("4"), numbers("4, 16,64")) == ([4], [4, 16, 64])
    for text in ("", "4,", "4,0", "4;5"):
        with pytest.raises(argparse.ArgumentTypeError):
            numbers(text)


# ---------------------------------------------------------------- atomic files


def killed_in_atomic_write(path: str, stage: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    synced: list[int] = []

    def second_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(descriptor)
        if len(synced) == 2:
            die()

    if stage == "replace":
        os.replace = die  # type: ignore[assignment]
    elif stage == "fsync":
        os.fsync = die  # type: ignore[assignment]
    elif stage == "fsync of the folder":
        os.fsync = second_fsync  # type: ignore[assignment]
    with script.atomic_write(Path(path)) as file:
        file.write("new" * 50_000)
        if stage == "writing":
            die()


@pytest.mark.parametrize("stage", ["writing", "fsync", "replace", "fsync of the folder"])
def test_atomic_write_survives_a_kill(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    (rank,) = run_ranks(killed_in_atomic_write, 1, str(path), stage)
    assert rank.returncode == -signal.SIGKILL
    assert path.read_text() == ("new" * 50_000 if stage == "fsync of the folder" else "old")
    with script.atomic_write(path) as file:  # what the killed process left does not disturb
        file.write("newer")
    assert path.read_text() == "newer"


def test_atomic_write_leaves_nothing_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    with script.atomic_write(path, "wb") as file:
        file.write(b"\0old")
    with pytest.raises(TypeError), script.atomic_write(path, "wb") as file:
        file.write("text into a binary file")
    assert path.read_bytes() == b"\0old"
    assert [p.name for p in tmp_path.iterdir()] == ["data.bin"]


# ---------------------------------------------------------------- logs

PROGRESS = """
    import sys
    from common import logs
    with logs.Progress(200, "training") as progress:
        for n in range(1, 201):
            progress.update(n, f"loss {n}")
"""


def test_progress_is_silent_in_a_pipe() -> None:
    done = python(PROGRESS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_progress_on_a_terminal(rank: str, shown: bool) -> None:
    leader, follower = pty.openpty()
    env = {**os.environ, "RANK": rank, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRESS)], stderr=follower, env=env) as child:
        os.close(follower)
        seen = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # Linux's end of a terminal
                break
            if not piece:
                break
            seen += piece
        assert child.wait(30) == 0
    os.close(leader)
    text = seen.decode()
    assert ("training" in text) == shown
    if shown:
        assert "200/200 loss 200" in text
        assert text.count("\r\x1b[2K") < 20  # ten times a second at most, and the last
        assert "█" * 24 in text
        assert text.endswith("\n")


@pytest.mark.parametrize(("rank", "all_ranks", "expected"), [("0", False, "IW"), ("1", False, "W"), ("1", True, "IW")])
def test_structured_logging_by_rank(
    rank: str, all_ranks: bool, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    root = logging.getLogger("book")
    before = (root.handlers[:], root.propagate, root.level)
    try:
        logs.setup(all_ranks=all_ranks)
        logs.setup(all_ranks=all_ranks)  # twice: still each line once
        logs.get_logger().info("saved 50%", step=20, loss=1.23456789, path=Path("a/b"))
        logs.get_logger("book.part").warning("slow")
    finally:
        root.handlers[:], root.propagate = before[:2]
        root.setLevel(before[2])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == list(expected)
    assert all(line.split()[1] == f"rank{rank}" for line in lines)
    assert lines[-1].endswith("W slow")
    if "I" in expected:
        assert lines[0].endswith("I saved 50%  step=20 loss=1.235 path=a/b")


def test_env_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for env, rank in (({}, 0), ({"SLURM_PROCID": "2"}, 2), ({"SLURM_PROCID": "2", "RANK": "5"}, 5), ({"RANK": "²"}, 0)):
        for name in ("RANK", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert logs.env_rank() == rank


def test_metrics_lose_at_most_the_line_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = logs.Metrics(path)
    rows = [{"step": n, "note": "a\u2028b\x85é"} for n in range(3)]
    for row in rows:
        metrics.write(**row)
    assert logs.Metrics.read(path) == rows  # before close: flushed
    metrics.close()
    whole = path.read_bytes()
    for cut in range(len(whole) - 30, len(whole)):
        path.write_bytes(whole[:cut])
        assert logs.Metrics.read(path) == rows[: whole[:cut].count(b"\n")]
    more = logs.Metrics(path)  # a resumed run goes on behind the torn line
    more.write(step=9)
    more.close()
    assert logs.Metrics.read(path) == [*rows[:2], {"step": 9}]


# ---------------------------------------------------------------- child processes

FAMILY = [
    sys.executable, "-c",
    "import subprocess, sys, time\n"
    "sleep = [sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]]\n"
    "subprocess.Popen(sleep)\n"
    "subprocess.Popen(sleep, start_new_session=True)\n"
    "print('up', flush=True)\n"
    "time.sleep(600)\n",
]  # fmt: skip


def family(mark: str) -> list[psutil.Process]:
    running = (p for p in psutil.process_iter(["cmdline", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE)
    return [p for p in running if mark in (p.info["cmdline"] or [])]


@pytest.mark.parametrize("how", ["stop", "kill", "exception", "parent killed first"])
def test_a_child_leaves_nothing_running(how: str) -> None:
    mark, up = f"family-{how}-{os.getpid()}", threading.Event()
    try:
        with process.Child([*FAMILY, mark], on_line=lambda _: up.set()) as child:
            assert up.wait(30)
            assert len(family(mark)) == 3
            if how == "stop":
                child.stop()
                assert family(mark) == []
                assert child.process.returncode == -signal.SIGTERM
            elif how == "kill":
                child.kill()
                assert family(mark) == []
                assert child.process.returncode == -signal.SIGKILL
            elif how == "exception":
                raise ZeroDivisionError
            else:
                child.process.kill()
                child.process.wait(10)
                assert len(family(mark)) == 2
    except ZeroDivisionError:
        assert how == "exception"
    assert family(mark) == []


def test_ctrl_c_leaves_nothing_running() -> None:
    mark = f"family-ctrl-c-{os.getpid()}"
    code = f"""
        import sys
        from common import process, script
        family = [*{FAMILY!r}, {mark!r}]
        script.run(lambda: process.run(family, timeout_s=300, on_line=lambda line: print(line, flush=True)))
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        parent.send_signal(signal.SIGINT)
        try:
            _, err = parent.communicate(timeout=30)
        finally:
            parent.kill()
    assert (parent.returncode, err) == (130, "interrupted\n")
    assert family(mark) == []


def test_a_child_ends_with_a_starter_that_can_stop_nothing() -> None:
    mark = f"family-orphan-{os.getpid()}"
    code = (
        f"from common import process; process.run([*{FAMILY!r}, {mark!r}], timeout_s=300, on_line=lambda _: print(1))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "1\n"
        starter.kill()
    _, alive = psutil.wait_procs(family(mark), timeout=30)
    assert alive == []


def test_a_finished_command() -> None:
    lines: list[str] = []
    code = "import sys; print('a'); print('RESULT {\"x\": 1}'); print('error: y; z', file=sys.stderr); sys.exit(4)"
    done = process.run([sys.executable, "-c", code], timeout_s=30, on_line=lines.append)
    assert (done.returncode, done.timed_out, done.result) == (4, False, {"x": 1})
    assert done.reason() == "exit 4: error: y; z"
    assert lines == ["a", 'RESULT {"x": 1}']
    told = "error [rank 0]: no model; take another\\n  error_file: <N/A>"  # torchrun's own words come last
    ranks = process.run([sys.executable, "-c", f"import sys; sys.exit('{told}')"], timeout_s=30)
    assert ranks.reason() == "exit 1: error [rank 0]: no model; take another"
    shell = process.run("sh -c 'kill -9 $$'", timeout_s=30)
    assert (shell.returncode, shell.result, shell.reason()) == (-9, None, "exit -9: no output")
    for last in ('RESULT {"x": 1', "RESULT [1]", 'RESULT {"x": 1}\\nand on'):
        assert process.run([sys.executable, "-c", f"print('{last}')"], timeout_s=30).result is None


def test_a_background_process_does_not_hold_its_parent_up() -> None:
    started = time.monotonic()
    done = process.run(["sh", "-c", "sleep 600 & echo done"], timeout_s=60)
    assert (done.returncode, done.stdout, done.timed_out) == (0, "done\n", False)
    assert time.monotonic() - started < 15


# ---------------------------------------------------------------- timers and memory


def test_step_timer_sums_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.5, 2.0, 2.25, 3.0, 4.0, 4.5, 5.0, 10.0, 10.5, 11.5, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = profiling.StepTimer(CPU)  # 0
    with timer.phase("forward"):  # 1 to 1.5
        pass
    with timer.phase("forward"):  # 2 to 2.25
        pass
    timer.end_step()  # at 3
    with timer.phase("forward"):  # 4 to 4.5
        pass
    timer.end_step()  # at 5
    timer.restart()  # at 10
    with timer.phase("backward"):  # 10.5 to 11.5
        pass
    timer.end_step()  # at 12
    assert timer.rows_ms() == [
        {"step": 3000.0, "forward": 750.0}, {"step": 2000.0, "forward": 500.0}, {"step": 2000.0, "backward": 1000.0},
    ]  # fmt: skip
    assert timer.median_ms(1) == {"step": 2000.0, "forward": 250.0, "backward": 500.0}
    assert timer.median_ms(3) == {}


def test_peak_memory_can_be_reset() -> None:
    reached, after, low = run_ranks(peaks, 1)[0].value
    assert reached > low + 150 * 2**20
    if after > reached - 100 * 2**20 and not resettable():
        pytest.skip("needs a kernel that resets VmHWM through /proc/self/clear_refs")
    assert after < reached - 100 * 2**20


def resettable() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "VmHWM" in Path("/proc/self/status").read_text()


def peaks() -> tuple[int, int, int]:
    low = profiling.memory(CPU).current
    block = np.ones(200 * 2**20, dtype=np.uint8)
    del block
    reached = profiling.memory(CPU).peak
    profiling.reset_peak_memory(CPU)
    return reached, profiling.memory(CPU).peak, low


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("backward", [False, True])
def test_flops_per_token_is_what_torch_counts(backward: bool) -> None:
    """Exact for the matrix products of the linear layers and for attention over all T positions.

    Attention runs in its "eager" form here: two batched products of T x T scores, causality not subtracted, which is
    how the formula (and PaLM's appendix) counts. The SDPA kernels register the same count under one operator.
    """
    batch, seq = 2, 32
    config = lm.config("nano", seq)
    model = lm.build(config)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    tokens = torch.randint(0, config.vocab_size, (batch, seq))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.sum().backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    times = 3 if backward else 1
    attention = 4 * config.num_hidden_layers * config.hidden_size * seq
    expected = profiling.flops_per_token(config, seq, backward=backward) * batch * seq
    linear = expected - times * attention * batch * seq
    # The rotary tables are outer products of positions and frequencies, a batched product that is no model FLOP.
    rotary = 2 * seq * config.hidden_size // config.num_attention_heads // 2
    assert counts.pop("aten.mm", 0) + counts.pop("aten.addmm", 0) == linear
    assert counts.pop("aten.bmm") - times * attention * batch * seq in (0, rotary, batch * rotary)
    assert counts == {}


def test_flops_of_grouped_query_attention() -> None:
    config = lm.config("1b", 128)
    layer = 2048 * 64 * (2 * 32 + 2 * 8) + 3 * 2048 * 8192
    expected = 2 * (16 * layer + 2048 * 128256) + 4 * 16 * 32 * 64 * 128
    assert profiling.flops_per_token(config, 128, backward=False) == expected
    assert profiling.flops_per_token(config, 128) == 3 * expected


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5),
        ("NVIDIA H200", torch.float16, 989.4),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA A10G", torch.bfloat16, None),  # not an A10
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA GH200 480GB", torch.bfloat16, None),  # neither an H200
        ("NVIDIA GB200", torch.bfloat16, None),  # nor a B200
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),  # a slice
        ("Tesla T4", torch.float16, 65),
        ("Tesla T4", torch.bfloat16, None),  # has none
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("Tesla V100-SXM2-16GB", torch.float32, 15.7),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
    ],
)
def test_peak_flops_is_known_or_none(
    name: str, dtype: torch.dtype, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak = profiling.peak_flops(torch.device("cuda"), dtype)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_no_mfu_on_a_cpu() -> None:
    assert profiling.peak_flops(CPU, torch.bfloat16) is None
    assert profiling.mfu(1e6, 1e9, CPU, torch.bfloat16) is None


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("preset", lm.PRESETS)
def test_parameter_count(preset: str) -> None:
    config = lm.config(preset)
    model = lm.build(config, "meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == lm.parameter_count(config)


def test_materialize_gives_every_weight_and_buffer_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    config = lm.config("nano")
    direct = lm.build(config, seed=3)
    monkeypatch.setattr(lm, "LARGE", 0)
    planned, again, other = (lm.build(config, seed=seed) for seed in (3, 3, 4))
    assert lm.weights_sha256(planned) == lm.weights_sha256(again) != lm.weights_sha256(other)
    ours, theirs = dict(planned.named_parameters()), dict(direct.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        wanted = theirs[name]
        assert weight.device == CPU
        assert (weight.shape, weight.dtype) == (wanted.shape, torch.float32)
        assert torch.isfinite(weight).all(), name
        assert weight.mean().item() == pytest.approx(wanted.mean().item(), abs=1e-3), name
        assert weight.std().item() == pytest.approx(wanted.std().item(), rel=0.03), name
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name  # norms
        else:
            assert weight.std().item() == pytest.approx(0.0625, rel=0.03), name
    buffers, wanted_buffers = dict(planned.named_buffers()), dict(direct.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert buffers.keys() == wanted_buffers.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, wanted_buffers[name]), name
    assert planned.lm_head.weight is planned.model.embed_tokens.weight  # type: ignore[union-attr]
    tokens = torch.arange(16)[None]
    assert torch.isfinite(planned(input_ids=tokens).logits).all()


def test_build_depends_on_the_seed_alone() -> None:
    config = lm.config("nano")
    torch.rand(7)
    first = lm.weights_sha256(lm.build(config, seed=1))
    torch.rand(9)
    assert lm.weights_sha256(lm.build(config, seed=1)) == first != lm.weights_sha256(lm.build(config, seed=2))


class _Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_save_and_load_bit_for_bit(tmp_path: Path) -> None:
    model = lm.build(lm.config("nano"), seed=5)
    for _ in range(2):  # also over an older one
        lm.save(model, _Tokenizer(), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    loaded = lm.load(str(tmp_path / "model"))
    assert lm.weights_sha256(loaded) == lm.weights_sha256(model)
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load the model"):
        lm.load(str(tmp_path / "model"))


def test_the_hash_sees_one_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))  # no dimension at all
    before = lm.weights_sha256(model)
    for parameter in model.parameters():
        bits = parameter.detach().reshape(-1).view(torch.int32)
        bits[-1] ^= 1
        assert lm.weights_sha256(model) != before
        bits[-1] ^= 1
        assert lm.weights_sha256(model) == before


@pytest.mark.parametrize("name", ["tiny", "/no/such/folder", "./here", "a/b/c"])
def test_no_such_model(name: str) -> None:
    for ask in (lm.config, lm.load_tokenizer):
        with pytest.raises(UserError, match="nano, small, 1b, 8b"):
            ask(name)


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    for ask in (lm.config, lm.load_tokenizer):
        with pytest.raises(UserError) as caught:
            ask("nobody/nothing")
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the model config"):
        lm.config(str(tmp_path))

"""Chapter 3's training: what each rank takes, that its step is the reference's, checkpoints, leaving when told to."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch01_intro import checkpoint
from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.harness import Case
from ch02_hardware_parallelism.strategy import share
from ch03_ddp import checkpoints, preemption, step, train_ddp
from ch03_ddp.feed import IGNORE, Documents, Feed, Prefetched
from ch03_ddp.strategies import OPTIONS, Compiled, Plain, RaggedLlama, token_count
from common import data, dist, process
from common.logs import Metrics
from common.script import UserError
from tests.inprocess import run_script
from tests.spawn import fork_script, run_ranks, values

TRAIN = "ch03_ddp/train_ddp.py"
END = 0


def rank_of(rank: int, world_size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))


def feed(rows, rank: int = 0, world_size: int = 1, **more) -> Feed:
    kept = {"global_batch": 6, "micro_batch": 2, "seed": 3, **more}
    return Feed(rows, rank_of(rank, world_size), **kept)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what each rank takes


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seq_len=st.integers(2, 16))
def test_documents_hold_every_target_once(lengths: list[int], seq_len: int) -> None:
    """A document of n tokens has n - 1 targets and its end: none is lost at a cut, none is counted twice."""
    tokens = np.concatenate([[*range(1, n), END] for n in lengths]).astype(np.uint16)
    rows = Documents(tokens, END, seq_len)
    everything = np.arange(len(rows))
    inputs, targets = rows.batch(everything)
    assert inputs.shape == targets.shape == (len(rows), seq_len)
    real = targets != IGNORE
    assert int(real.sum()) == rows.token_count(everything) == sum(n - 1 for n in lengths)
    wanted = sorted(t for n in lengths for t in [*range(2, n), END][: n - 1])
    assert sorted(targets[real].tolist()) == wanted
    assert not (inputs[real] == END).any(), "no row goes on after a document's end"


@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(1, 5), global_batch=st.integers(5, 12), micro=st.integers(1, 4), at=st.integers(0, 3))
def test_any_number_of_ranks_takes_the_same_steps(world_size: int, global_batch: int, micro: int, at: int) -> None:
    rows = data.Blocks(np.arange(7 * 9 + 1, dtype=np.uint16), 7)  # nine blocks: steps reach over an epoch's end
    one = feed(rows, global_batch=global_batch, micro_batch=micro)
    feeds = [feed(rows, r, world_size, global_batch=global_batch, micro_batch=micro) for r in range(world_size)]
    for _ in range(at):
        next(one)
    resumed = [
        feed(rows, r, world_size, global_batch=global_batch, micro_batch=micro, position=one.order.position)
        for r in range(world_size)
    ]
    for several in (feeds, resumed):
        while several[0].order.position < one.order.position:
            for each in several:
                next(each)
    whole = next(one)
    for several in (feeds, resumed):
        parts = [next(each) for each in several]
        assert np.concatenate([p.indices for p in parts]).tolist() == whole.indices.tolist()
        assert {p.tokens for p in parts} == {whole.tokens} == {global_batch * 7}
        assert {p.position for p in parts} == {whole.position}
        assert all(len(inputs) <= micro for p in parts for inputs, _ in p.micro_batches)


def test_prefetched_steps_are_the_same_and_positions_are_of_what_was_handed_out() -> None:
    rows = data.Blocks(np.arange(500, dtype=np.uint16), 5)
    plain, ahead = feed(rows), Prefetched(feed(rows))
    try:
        for _ in range(5):
            one, other = next(plain), next(ahead)
            assert one.position == other.position
            for (a, b), (c, d) in zip(one.micro_batches, other.micro_batches, strict=True):
                assert torch.equal(a, c)
                assert torch.equal(b, d)
    finally:
        ahead.close()
    with pytest.raises(OSError, match="disk"):
        next(Prefetched(feed(Broken())))


class Broken:
    seq_len = 4

    def __len__(self) -> int:
        return 10

    def batch(self, indices: np.ndarray) -> None:
        raise OSError("the disk is gone")


def test_a_step_too_small_for_the_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="raise --global-batch"):
        feed(data.Blocks(np.arange(50), 5), 0, 8)


# ---------------------------------------------------------------- the same computation


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_option_computes_what_one_process_does(ranks: int) -> None:
    cases = [
        Case(ranks, accumulation, "float64", tied=hard, frozen=hard, uneven=hard, by_hand=False)
        for accumulation in (1, 4)
        for hard in (False, True)
    ]
    eager = [option for option in OPTIONS.values() if option is not Compiled]
    outcomes = harness.check(eager, cases, RaggedLlama(), timeout_s=280)
    outcomes += harness.check([Compiled], cases[::3], RaggedLlama(), timeout_s=280)  # its variants take seconds each
    assert len(outcomes) == len(eager) * 4 + 2
    assert [o.diagnosis() for o in outcomes if not o.ok] == []


def test_the_table_has_the_names_that_a_reader_types_and_is_printed_once(tmp_path: Path) -> None:
    flags = ["--option", "loss-scaling,identity-hook", "--accumulation", "1", "--run-dir", str(tmp_path)]
    done, other = fork_script("ch03_ddp/parity.py", 2, flags)
    assert (done.returncode, other.returncode) == (0, 0), done.stderr + other.stderr
    assert done.value == json.loads((tmp_path / "result.json").read_text())
    said = (done.stdout + other.stdout).splitlines()
    assert [line.split()[0] for line in said if " ok " in line] == ["loss-scaling", "identity-hook"]


class MeanOfMeans(Plain):
    """Each rank divides by its own tokens, as `loss.mean()` does."""

    def backward(self, micro_batches):
        mine = [share(batch, self.comm.rank, self.comm.size) for batch in micro_batches]
        loss = step.backward(self.ddp, mine, token_count(mine) * self.comm.size, self.comm.size, self.precision)
        self.comm.all_reduce(loss)
        return loss


def test_the_usual_mistake_with_ragged_rows_is_found() -> None:
    (outcome,) = harness.check([MeanOfMeans], [Case(2, by_hand=False)], RaggedLlama())
    assert "gradient" in outcome.failures
    assert "loss" in outcome.failures


# ---------------------------------------------------------------- checkpoints


def state_of(number: float) -> dict:
    return {"model": {"w": torch.full((1000,), number)}, "position": int(number)}


@pytest.mark.parametrize("in_background", [False, True])
def test_the_newest_and_the_best_stay(tmp_path: Path, in_background: bool) -> None:
    keeper = checkpoints.Keeper(tmp_path, {"a": 1}, keep=2, in_background=in_background)
    for number, loss in enumerate([5.0, 3.0, None, 4.0, 3.5, None], 1):
        state = state_of(number)
        keeper.save(number, state, loss)
        state["model"]["w"].zero_()  # the next step, which must not reach into what is being written
    keeper.wait()
    assert [p.name for p in checkpoint.every(tmp_path)] == [f"step-{n:08d}" for n in (2, 5, 6)]
    assert keeper.best_before(7) == ("step-00000002", 3.0)
    if in_background:
        found = checkpoints.newest_whole(tmp_path, {"a": 1})
        assert found is not None
        assert found[2]["model"]["w"].tolist() == [6.0] * 1000


def test_a_resume_from_an_older_checkpoint_keeps_what_it_writes(tmp_path: Path) -> None:
    first = checkpoints.Keeper(tmp_path, {}, keep=3, in_background=False)
    for number, loss in ((4, 3.0), (8, 2.0), (12, 1.0)):
        first.save(number, state_of(number), loss)
    again = checkpoints.Keeper(tmp_path, {}, keep=2, in_background=False)  # from 4: 8 and 12 are of a course it left
    told = []
    for number, loss in ((5, 5.0), (6, 4.0), (7, 2.5)):
        again.save(number, state_of(number), loss)
        told.append([p.name[-2:] for p in checkpoint.every(tmp_path)])
    assert told == [["04", "05"], ["05", "06"], ["06", "07"]], "the best of that course is none of this one"
    assert again.best_before(8) == ("step-00000007", 2.5)
    assert again.best_before(7)[0] == "", "it is being written anew"


def test_a_full_disk_in_the_background_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    keeper = checkpoints.Keeper(tmp_path, {}, keep=2, in_background=True)
    monkeypatch.setattr(checkpoint, "save", full)
    keeper.save(1, state_of(1))
    with pytest.raises(OSError, match="No space"):
        keeper.wait()
    keeper.wait()  # told once


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, number, state_of(number), {}, keep=3)
    assert checkpoints.newest_whole(tmp_path / "nothing", {}) is None
    (tmp_path / "step-00000003/state.pt").write_bytes(b"short")
    (tmp_path / "step-00000002/meta.json").unlink()
    found = checkpoints.newest_whole(tmp_path, {})
    assert found is not None
    assert found[1] == 1
    (tmp_path / "step-00000001/meta.json").write_text("{")
    with pytest.raises(UserError, match=r"all 3 checkpoints in .* are corrupt"):
        checkpoints.newest_whole(tmp_path, {})


# ---------------------------------------------------------------- told to leave


def told_to_leave(guilty: int) -> tuple[int, int | None]:
    """A loop of ten steps in which one rank gets a signal in the fourth: the step after which this rank left."""
    with dist.session("cpu", timeout_s=30) as ctx:
        watch = preemption.Preemption([signal.SIGUSR1], ctx)
        for number in range(1, 11):
            watch.ask()
            if number == 4 and ctx.rank == guilty:
                os.kill(os.getpid(), signal.SIGUSR1)
            if caught := watch.answer():
                return number, int(caught)
        return number, None


@pytest.mark.parametrize("guilty", [0, 2])
def test_all_ranks_leave_after_the_same_step(guilty: int) -> None:
    assert values(run_ranks(told_to_leave, 3, guilty, timeout_s=60)) == [(5, signal.SIGUSR1)] * 3


@pytest.mark.parametrize(
    ("caught", "state", "preempted", "asked"),
    [
        ("SIGUSR1", "RUNNING", "None", True),  # told before its limit, or by hand
        ("SIGTERM", "RUNNING", "2026-01-01T00:00:00", True),  # preempted, with a GraceTime
        ("SIGTERM", "RUNNING", "None", False),  # torchrun, for a node that joins
        ("SIGTERM", "COMPLETING", "None", False),  # scancel
        ("SIGUSR1", "COMPLETING", "None", False),
    ],
)
def test_requeue_asks_slurm_only_when_it_should(
    caught: str, state: str, preempted: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho "JobState={state} PreemptTime={preempted}"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not preemption.requeue(signal.Signals[caught])
    assert not calls.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert preemption.requeue(signal.Signals[caught]) == asked
    assert ("requeue 42" in calls.read_text()) == asked


SMALL = ["--preset", "nano", "--seq-len", "32", "--batch-size", "2", "--val-tokens", "512", "--sample-tokens", "0"]


def train(flags: list[str]) -> dict:
    return train_ddp.main(flags)


def test_one_rank_gets_sigterm_and_the_job_goes_on_later_as_if_nothing_had_been(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "14", "--log-every", "1", "--ragged", "--dropout", "0.1", "--resume", "auto"]
    flags += ["--threads", "1"]
    words = [*flags, "--out", str(tmp_path / "whole"), "--run-dir", str(tmp_path / "r1")]
    whole = values(run_ranks(train, 2, words, timeout_s=90))[0]
    out = tmp_path / "left"
    command = [
        "torchrun",
        "--standalone",
        "--nproc-per-node=2",
        TRAIN,
        *flags,
        "--out",
        str(out),
        "--run-dir",
        str(tmp_path / "r2"),
    ]
    with process.Child(command) as child:
        while not (out / "losses.jsonl").exists() or len(Metrics.read(out / "losses.jsonl")) < 4:
            assert child.process.poll() is None, child.wait(5).stderr
        worker = next(p for p in child.tree() if p.environ().get("RANK") == "1" and TRAIN in " ".join(p.cmdline()))
        worker.send_signal(signal.SIGTERM)
        left = child.wait(60)
    assert left.returncode == 0, left.stderr
    assert left.result is not None
    assert left.result["preempted"] is True
    assert 4 <= left.result["steps"] < 14
    words = [*flags, "--out", str(out), "--run-dir", str(tmp_path / "r3")]
    again = values(run_ranks(train, 2, words, timeout_s=90))[0]
    assert again["resumed_at_step"] == left.result["steps"]
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert again["ranks_agree"]
    losses = [Metrics.read(folder / "losses.jsonl") for folder in (tmp_path / "whole", out)]
    assert losses[0] == losses[1]


# ---------------------------------------------------------------- mistakes


BAD_INPUT = [
    ("--global-batch 0", "below 1"),
    ("--dropout 1.5", "not a probability"),
    ("--dropout much", "not a number"),
    ("--bucket-mib 0", "above 0"),
    ("--hook zip", "invalid choice"),
    ("--preempt-signals NOPE", "there is no signal 'NOPE'"),
    ("--record-samples", "pass --out DIR"),
    ("--resume auto", "--out"),
    ("--save-every 3", "--out"),
    ("--dtype fp8", "invalid choice"),
]


@pytest.mark.parametrize(("flags", "says"), BAD_INPUT, ids=lambda v: v.replace("/", "") if isinstance(v, str) else "")
def test_a_mistake_is_one_line(flags: str, says: str, tmp_path: Path) -> None:
    done = run_script(TRAIN, [*flags.split(), "--run-dir", tmp_path / "run"])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr


def test_other_settings_are_refused_and_another_number_of_ranks_is_not(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "3", "--global-batch", "4", "--out", tmp_path / "out", "--dtype", "fp32"]
    done = run_script(TRAIN, [*flags, "--run-dir", tmp_path / "a"])
    assert done.returncode == 0, done.stderr
    refused = run_script(TRAIN, [*flags, "--lr", "1", "--resume", "auto", "--run-dir", tmp_path / "b"])
    assert refused.returncode == 2
    assert "made with lr" in refused.stderr
    never = run_script(TRAIN, [*flags, "--run-dir", tmp_path / "c"])
    assert never.returncode == 2
    assert "already holds checkpoints" in never.stderr
    restarted = run_script(TRAIN, [*flags, "--run-dir", tmp_path / "d"], env={"SLURM_RESTART_COUNT": "1"})
    assert restarted.returncode == 0, restarted.stderr
    assert restarted.result is not None
    assert restarted.result["resumed_at_step"] == 3
    assert json.loads((tmp_path / "d/result.json").read_text())["world_size"] == 1

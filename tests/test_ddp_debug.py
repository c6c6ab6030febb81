"""Chapter 3, the debugging utilities: every planted fault is named with its rank and cause, and nobody else is blamed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ch03_ddp import diagnose, faults, planted
from ch03_ddp.diagnose import alarm, watcher
from ch03_ddp.diagnose.fingerprints import PART, fingerprint
from ch03_ddp.diagnose.interpose import COLLECTIVES, bound, described, message, signature_of
from ch03_ddp.diagnose.recorder import Call, line_of
from ch03_ddp.diagnose.verdict import Report, Verdict, judge
from common import dist
from common.dist import Context
from common.script import UserError
from tests.spawn import Rank, run_ranks, torchrun, values

RANKS = 3  # with fewer there is no majority
TIMEOUT_S = 2
LIMIT_S = 40  # of the whole process: what hangs is killed then, and fails the test


def in_turn(faults_in_turn: list[str], guilty: int, check: bool) -> list[dict[str, Any]]:
    args = argparse.Namespace(device="cpu", timeout_s=TIMEOUT_S, check=check)
    return [faults.provoke(fault, guilty, args) for fault in faults_in_turn]


def provoked(faults_in_turn: list[str], guilty: int, *, check: bool = False) -> list[Rank]:
    """Each fault in a session of its own. Those that break no connection can have the same ranks, one after the other."""
    return run_ranks(in_turn, RANKS, faults_in_turn, guilty, check, timeout_s=LIMIT_S)


# what the verdict must hold besides the rank
SAYS = {
    "deadlock": ["never entered all_reduce #4 (float32 []", "planted.py:", " is at planted.py:", "ctx.barrier("],
    "order": ["called broadcast", "all_reduce", "#1"],
    "shape": ["float32 [262143]", "float32 [262144]"],
    "uneven": ["is through", "never enters all_reduce", "Join"],
    "slow": ["works 5", "times as fast"],
    "death": ["gone", "all_reduce #"],
    "inplace-bucket": ["in place", "last.weight"],
    "desync": ["parameter extra.weight", "first of 1 parameters"],
    "unused": ["extra.weight, extra.bias"],
    "unused-unasked": ["extra.weight, extra.bias", "waited in all_reduce"],
}


HARMLESS = ("order", "shape", "slow", "desync", "unused")  # nobody hangs and nobody dies of them
TOGETHER = [["none", *HARMLESS, "deadlock"], *([fault] for fault in SAYS if fault not in (*HARMLESS, "deadlock"))]


@pytest.mark.parametrize("guilty", [0, 2])
@pytest.mark.parametrize(
    "together", [pytest.param(names, marks=[pytest.mark.alone] * ("slow" in names)) for names in TOGETHER], ids="+".join
)
def test_every_rank_that_lives_names_the_right_rank_and_cause(together: list[str], guilty: int) -> None:
    ended = provoked(together, guilty)
    assert not any(rank.timed_out for rank in ended)
    living = [rank for number, rank in enumerate(ended) if not (together == ["death"] and number == guilty)]
    assert [rank.returncode for rank in living] == [0] * len(living), [rank.stderr[-500:] for rank in ended]
    if together == ["death"]:
        assert ended[guilty].returncode == -signal.SIGKILL
    for rank in living:
        for fault, said in zip(together, rank.value, strict=True):
            assert said["cause"] == faults.CAUSES.get(fault, fault), said
            assert said["rank"] == (None if fault == "none" else guilty)
            for words in SAYS.get(fault, ["nothing found"]):
                assert words in said["verdict"]


def test_all_faults_are_tried() -> None:
    assert set(planted.FAULTS) < set(SAYS)
    assert set(SAYS) == {fault for together in TOGETHER for fault in together} - {"none"}


@pytest.mark.alone
@pytest.mark.parametrize("check", [False, True])
def test_a_healthy_job_is_left_in_peace(check: bool) -> None:
    for rank in provoked(["none", "uneven-joined", "none"], 1, check=check):
        assert rank.returncode == 0, rank.stderr[-2000:]
        assert [said["verdict"] for said in rank.value] == ["nothing found"] * 3


# ---------------------------------------------------------------- other ways to fail


def watched(
    body: Callable[[Context, watcher.Watch], object], *, check: bool = False, timeout_s: float = TIMEOUT_S
) -> Verdict | str | None:
    """On each rank: the verdict that left the block, or the name of another exception."""
    try:
        with (
            dist.session("cpu", timeout_s=60, threads=1) as ctx,
            diagnose.watch(ctx, timeout_s=timeout_s, check=check) as w,
        ):
            body(ctx, w)
    except diagnose.Fault as fault:
        return fault.verdict
    except ValueError as error:
        return str(error)
    return None


def wrong_order_unchecked() -> Any:
    return watched(lambda ctx, w: planted.order(ctx, w, 1))


def absent_checked() -> Any:
    return watched(lambda ctx, w: planted.deadlock(ctx, w, 1), check=True)


def wrong_calls() -> Any:
    """Found before they are made. Both all_reduces are of the same shape: nothing would hang, the sums would be wrong."""
    double = lambda ctx, _: td.all_reduce(torch.ones(4, dtype=torch.float64 if ctx.rank == 1 else None))  # noqa: E731
    largest = lambda ctx, _: td.all_reduce(torch.ones(4), td.ReduceOp.MAX if ctx.rank == 1 else td.ReduceOp.SUM)  # noqa: E731
    root = lambda ctx, _: td.broadcast(torch.ones(4), ctx.rank // 2)  # noqa: E731
    return [watched(body, check=True) for body in (double, largest, root)]


def own_error() -> Any:
    def body(ctx: Context, _: watcher.Watch) -> None:
        if ctx.rank == 1:
            raise ValueError("no such file")
        td.all_reduce(torch.ones(4))

    return watched(body)


def silent() -> Any:
    """The root's broadcast ends although nobody receives it: only the end of the block can tell."""

    def body(ctx: Context, _: watcher.Watch) -> None:
        if ctx.rank == 1:
            td.broadcast(torch.ones(4), src=1)

    return watched(body)


def late() -> Any:
    """Longer than the timeout, but not for ever, and not in a collective: no fault."""

    def body(ctx: Context, _: watcher.Watch) -> None:
        td.all_reduce(torch.ones(4))
        if ctx.rank == 1:
            time.sleep(0.5)
        td.all_reduce(torch.ones(4))

    return watched(body, timeout_s=20)


@pytest.mark.parametrize(
    ("job", "cause", "words"),
    [
        (wrong_order_unchecked, "order", "rank 1 called broadcast #"),
        (absent_checked, "deadlock", "rank 1 never entered all_reduce #"),
    ],
)
def test_other_faults(job: Callable[[], Any], cause: str, words: str) -> None:
    said = values(run_ranks(job, RANKS, timeout_s=LIMIT_S))
    assert {verdict.cause for verdict in said} == {cause}
    assert all(words in verdict.text for verdict in said), said


def test_wrong_calls_are_found_before_they_are_made() -> None:
    for double, largest, root in values(run_ranks(wrong_calls, RANKS, timeout_s=LIMIT_S)):
        assert (double.cause, double.ranks) == ("shape", (1,))
        assert "rank 1 called all_reduce #1 with float64 [4]" in double.text
        assert (largest.cause, largest.ranks) == ("order", (1,))
        assert "rank 1 called all_reduce(MAX) #1" in largest.text
        assert (root.cause, root.ranks) == ("order", (2,))
        assert "rank 2 called broadcast(src=1) #1" in root.text


def test_a_broadcast_that_nobody_receives() -> None:
    """gloo may let the root go on or keep it waiting: then it called too much, or the others are through too early."""
    said = values(run_ranks(silent, RANKS, timeout_s=LIMIT_S))
    assert {verdict.cause for verdict in said} in ({"order"}, {"uneven"})
    assert all("rank 1" in verdict.text and "broadcast" in verdict.text for verdict in said), said


def test_what_is_late_and_comes_is_no_fault() -> None:
    assert values(run_ranks(late, RANKS, timeout_s=LIMIT_S)) == [None] * RANKS


def test_a_rank_keeps_its_own_exception_and_the_others_are_told_of_it() -> None:
    first, second, third = values(run_ranks(own_error, RANKS, timeout_s=LIMIT_S))
    assert second == "no such file"
    assert first == third
    assert (first.cause, first.ranks) == ("error", (1,))
    assert "ValueError: no such file (test_ddp_debug.py:" in first.text


def asleep() -> Any:
    """The main thread never comes back: the process must end all the same."""
    watcher.LEAVE_S = 1

    def body(ctx: Context, _: watcher.Watch) -> None:
        if ctx.rank == 1:
            time.sleep(1000)
        td.all_reduce(torch.ones(4))

    return watched(body)


def test_a_rank_that_never_comes_back_is_ended_with_the_verdict() -> None:
    first, second, third = run_ranks(asleep, RANKS, timeout_s=LIMIT_S)
    assert second.returncode == 2
    assert not second.timed_out
    assert "error [rank 1]: rank 1 never entered all_reduce #1" in second.stderr
    assert "time.sleep(1000)" in second.stderr
    assert first.value == third.value
    assert first.value.ranks == (1,)


def signalled(number: int) -> Any:
    """Rank 1 gets a signal before the collective that the others are in; rank 0 ends what is only stopped."""
    alarm.ANSWER_S = 1
    pids: list[str] = []

    def body(ctx: Context, _: watcher.Watch) -> None:
        pids.extend(ctx.exchange("pids", str(os.getpid())))
        if ctx.rank == 1:
            os.kill(os.getpid(), number)
            time.sleep(1000)  # a signal may come a moment later
        td.all_reduce(torch.ones(4))

    try:
        return watched(body)
    finally:
        if number == signal.SIGSTOP and os.environ["RANK"] == "0":
            os.kill(int(pids[1]), signal.SIGKILL)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGSTOP, signal.SIGKILL), (signal.SIGTERM, signal.SIGTERM)])
def test_stopped_and_terminated(number: int, ends: int) -> None:
    """A stopped rank does not answer; a terminated one dies as it should, and then is gone."""
    first, second, third = run_ranks(signalled, RANKS, number, timeout_s=LIMIT_S)
    assert second.returncode == -ends
    for rank in (first, third):
        assert (rank.value.cause, rank.value.ranks) == ("death", (1,)), rank.stderr[-1000:]
        assert ("no answer" if number == signal.SIGSTOP else "ended") in rank.value.text


def test_under_torchrun_the_survivors_say_who_died() -> None:
    done = torchrun("ch03_ddp/faults.py", RANKS, ["--fault", "death", "--rank", "1", "--device", "cpu"])
    assert not done.timed_out
    assert done.returncode == 1  # torchrun's own word for it
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert (result["cause"], result["rank"]) == ("death", 1)


def test_a_process_id_means_something_at_home_only() -> None:
    store, gone = td.HashStore(), subprocess.Popen(["true"])
    gone.wait()
    here = alarm.Alarm(store, 0, 3)
    store.set("process/1", f"{gone.pid} {alarm.process_table()}")
    store.set("process/2", f"{gone.pid} {alarm.process_table()}, in another container")
    assert here.ended() == {1: f"its process {gone.pid} ended"}


# ---------------------------------------------------------------- what the watch must not change


def trained() -> dict[str, list[torch.Tensor]]:
    """The weights after some steps, watched and not, on one rank; in the end everything is as it was."""
    originals = {name: getattr(td, name) for name in COLLECTIVES}
    wait, weights = td.Work.wait, {}
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        first = td.new_group([0])
        for kind in ("plain", "watched", "afterwards"):
            torch.manual_seed(0)
            ddp = DistributedDataParallel(planted.Model(), bucket_cap_mb=1e-4, gradient_as_bucket_view=True)
            optimizer = torch.optim.AdamW(ddp.parameters())
            torch.manual_seed(ctx.rank)
            block = diagnose.watch(ctx, timeout_s=20, check=True) if kind == "watched" else contextlib.nullcontext()
            with block as watch:
                if watch:
                    watch.model(ddp)
                    assert td.all_reduce is not originals["all_reduce"]
                    if ctx.rank == 0:  # the group by its place: it is no business of rank 1
                        td.all_reduce(torch.ones(1), td.ReduceOp.SUM, first)
                    td.barrier(first)
                for _ in range(4):
                    ddp(planted.batch(ctx)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            if watch:
                ddp(planted.batch(ctx)).backward()  # what the watch has left in the model still averages
                assert {name: getattr(td, name) for name in COLLECTIVES} == originals
                assert td.Work.wait is wait
                assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
                weights["gradients"] = [p.grad.clone() for p in ddp.parameters()]
            weights[kind] = [p.detach().clone() for p in ddp.parameters()]
        torch.manual_seed(0)
        weights["untrained"] = [p.detach().clone() for p in planted.Model().parameters()]
    return weights


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_watched_training_computes_the_same_bits() -> None:
    first, second = values(run_ranks(trained, 2, timeout_s=LIMIT_S))
    assert not equal(first["plain"], first["untrained"])
    for kind in ("watched", "afterwards"):
        assert equal(first[kind], first["plain"])
    for kind in ("plain", "watched", "gradients"):
        assert equal(first[kind], second[kind])


# ---------------------------------------------------------------- the questions


def drifted() -> dict[str, Any]:
    """Each kind of tensor made different on one rank in turn: what desync says."""
    said: dict[str, Any] = {}
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).to(torch.float32)
        torch.manual_seed(0)
        nn.init.normal_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        with torch.no_grad():
            model[0].bias[0] = float("nan")
        said["equal"] = diagnose.desync(ctx, model, optimizer)

        def changed(name: str, tensor: torch.Tensor, change: Callable[[torch.Tensor], object], rank: int) -> None:
            kept = tensor.detach().clone()
            with torch.no_grad():
                if ctx.rank == rank:
                    change(tensor)
                said[name] = diagnose.desync(ctx, model, optimizer)
                tensor.copy_(kept)

        def flip(tensor: torch.Tensor) -> None:
            """The last bit of the last number, which is in no whole 8-byte word: 15 float32 numbers are 7.5 words."""
            tensor.view(torch.int32).flatten()[-1:].bitwise_xor_(1)

        changed("bit", model[0].weight, flip, 1)
        changed("sign", model[0].weight, lambda x: x.view(-1)[1::6].neg_(), 2)
        changed("swap", model[0].weight, lambda x: x.copy_(x.flip(0)), 2)
        changed("norm", model[1].weight, lambda x: x.fill_(0.25), 0)
        changed("buffer", model[1].running_mean, lambda x: x.fill_(1), 1)
        changed("counter", model[1].num_batches_tracked, lambda x: x.add_(1), 2)
        changed("moment", optimizer.state[model[1].bias]["exp_avg"], lambda x: x.mul_(2), 1)
        said["restored"] = diagnose.desync(ctx, model, optimizer)
        taken = optimizer.state.pop(model[1].bias) if ctx.rank == 2 else None
        said["no state"] = diagnose.desync(ctx, model, optimizer)
        if taken:
            optimizer.state[model[1].bias] = taken
        changed("not asked", model[0].weight, lambda x: x.zero_() if ctx.rank else None, 1)
    return said


def test_desync_names_the_tensor_and_the_rank() -> None:
    said, *others = values(run_ranks(drifted, RANKS, timeout_s=LIMIT_S))
    assert all(other == said for other in others)
    assert said["equal"] is None
    assert said["restored"] is None
    expected = {
        "bit": (1, "parameter 0.weight"),
        "sign": (2, "parameter 0.weight"),
        "swap": (2, "parameter 0.weight"),
        "norm": (0, "parameter 1.weight"),
        "buffer": (1, "buffer 1.running_mean"),
        "counter": (2, "buffer 1.num_batches_tracked"),
        "moment": (1, "optimizer exp_avg of 1.bias"),
    }
    for name, (rank, tensor) in expected.items():
        assert said[name].ranks == (rank,), said[name]
        assert f"another {tensor} than" in said[name].text
    assert said["no state"].ranks == (2,)
    assert "rank 2 holds nothing where ranks 0-1 hold optimizer step of 1.bias (float32 [])" in said["no state"].text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_every_bit_counts_and_so_does_its_place(dtype: torch.dtype) -> None:
    tensor = torch.randn(37, generator=torch.Generator().manual_seed(0)).mul(50).abs().to(dtype)
    found = {fingerprint(tensor).item()}
    bits = tensor.view(torch.uint8)
    for place in range(8 * len(bits)):
        bits[place // 8] ^= 1 << place % 8
        found.add(fingerprint(tensor).item())
        bits[place // 8] ^= 1 << place % 8
    found |= {fingerprint(tensor.roll(shift)).item() for shift in range(1, 37)}
    assert len(found) == 1 + 8 * len(bits) + 36
    large = torch.zeros(3 * PART)
    large[1] = 1
    assert fingerprint(large) != fingerprint(large.roll(PART))
    assert fingerprint(large[1:]) == fingerprint(large[1:].clone())


def asked() -> tuple[list[bool], Verdict | None, Verdict | None]:
    """Unused parameters: gradients are put back, and the pace of a loop without DDP."""
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        ddp = DistributedDataParallel(planted.Model())
        for p in ddp.parameters():
            p.grad = torch.full_like(p, 7)
        ddp.module.first.bias.grad = None
        found = diagnose.unused(ctx, ddp, lambda: ddp(planted.batch(ctx), ctx.rank == 1))
        kept = [p.grad is None or bool((p.grad == 7).all()) for p in ddp.parameters()]
        with diagnose.watch(ctx, timeout_s=20) as w:
            for _ in range(8):
                if ctx.rank == 2:
                    time.sleep(0.03)
                work = td.all_reduce(torch.ones(4), async_op=True)
                work.wait()
                td.barrier()
                w.step()
            pace = w.straggler()
    return kept, found, pace


@pytest.mark.alone
def test_unused_on_two_ranks_and_a_straggler_without_ddp() -> None:
    for kept, found, pace in values(run_ranks(asked, RANKS, timeout_s=LIMIT_S)):
        assert all(kept)
        assert found is not None
        assert found.ranks == (0, 2)
        assert found.text.count("extra.weight, extra.bias") == 2
        assert pace is not None
        assert (pace.cause, pace.ranks) == ("slow", (2,))


# ---------------------------------------------------------------- the judge alone


def call(number: int, op: str = "all_reduce", group: str = "0", *, done: bool = True, shape: tuple = (4,)) -> Call:
    return Call(group, number, op, "float32", shape, f"train.py:{number}", done)


def report(rank: int, *calls: Call, groups: dict[str, list[int]] | None = None, state: str = "inside") -> Report:
    return Report(rank, state, "train.py:9: x", calls=list(calls), groups=groups or {"0": [0, 1, 2]})


def judged(*reports: Report) -> Verdict | None:
    passed = [Report.loads(each.dumps()) for each in reports]  # as through the store
    return judge({each.rank: each for each in passed}, {})


def test_judge_takes_the_first_mismatch_even_if_later_calls_hang() -> None:
    usual = [call(1), call(2, "broadcast"), call(3, done=False)]
    verdict = judged(
        report(0, *usual), report(1, call(1), call(2), call(3, "broadcast", done=False)), report(2, *usual)
    )
    assert verdict is not None
    assert (verdict.cause, verdict.ranks) == ("order", (1,))
    assert "#2" in verdict.text


def test_judge_looks_into_each_group_by_itself() -> None:
    groups = {"0": [0, 1, 2], "7": [1, 2]}
    waiting = report(1, call(1), call(1, "broadcast", "7", done=False), groups=groups)
    verdict = judged(report(0, call(1)), waiting, report(2, call(1), groups=groups))
    assert verdict is not None
    assert (verdict.cause, verdict.ranks) == ("deadlock", (2,))
    assert "where rank 1 waits" in verdict.text


def test_judge_follows_the_waiting_to_its_cause() -> None:
    """Rank 2 waits for ranks 0 and 1, and rank 0 in a small group for rank 1, which is elsewhere."""
    groups = {"0": [0, 1, 2], "7": [0, 1]}
    in_small = report(0, call(1), call(1, "broadcast", "7", done=False), groups=groups)
    verdict = judged(in_small, report(1, call(1), groups=groups), report(2, call(1), call(2, done=False)))
    assert verdict is not None
    assert (verdict.cause, verdict.ranks) == ("deadlock", (1,))
    assert "never entered broadcast #1" in verdict.text
    both = report(1, call(1), call(2, done=False), groups=groups)  # now each of the two waits for the other
    verdict = judged(in_small, both, report(2, call(1), call(2, done=False)))
    assert verdict is not None
    assert (verdict.cause, verdict.ranks) == ("order", (0, 1))
    assert "rank 0 never entered all_reduce #2" in verdict.text
    assert "rank 1 never entered broadcast #1" in verdict.text


def test_judge_of_a_rank_that_is_far_ahead() -> None:
    ahead = [call(number) for number in range(150, 250)]
    verdict = judged(report(0, *ahead), report(1, call(1)), report(2, *ahead))
    assert verdict is not None
    assert (verdict.cause, verdict.ranks) == ("deadlock", (1,))
    assert "never entered all_reduce #150" in verdict.text


def test_judge_blames_the_one_that_is_furthest_behind() -> None:
    verdict = judged(report(0, call(1), call(2), call(3, done=False)), report(1, call(1)), report(2, call(1), call(2)))
    assert verdict is not None
    assert (verdict.ranks, "all_reduce #2" in verdict.text) == ((1,), True)


def test_judge_tells_a_slow_network_from_a_fault() -> None:
    stuck = judged(*(report(rank, call(1, done=False)) for rank in range(3)))
    assert stuck is not None
    assert stuck.cause == "network"
    assert judged(*(report(rank, call(1)) for rank in range(3))) is None


def test_judge_accepts_what_may_differ() -> None:
    """Other sizes in a gather, and the same numbers in another shape."""
    assert (
        judged(report(0, call(1, "gather", shape=(9,))), report(1, call(1, "gather")), report(2, call(1, "gather")))
        is None
    )
    assert judged(report(0, call(1, shape=(2, 2))), report(1, call(1)), report(2, call(1))) is None


def test_of_two_ranks_the_first_is_the_measure() -> None:
    groups = {"0": [0, 1]}
    verdict = judged(report(0, call(1, shape=(3,)), groups=groups), report(1, call(1), groups=groups))
    assert verdict is not None
    assert (verdict.cause, verdict.ranks) == ("shape", (1,))


def test_reading_calls() -> None:
    x, y = torch.ones(2), torch.ones(3)

    def read(name: str, *args: Any, **kwargs: Any) -> tuple[str, torch.Tensor | None]:
        given = bound(getattr(td, name), args, kwargs)
        return described(name, given), message(name, given)

    assert read("reduce", x, dst=2, op=td.ReduceOp.MIN) == ("reduce(dst=2, MIN)", x)
    assert read("all_reduce", tensor=x, async_op=True) == ("all_reduce", x)
    assert read("all_reduce", x, td.ReduceOp.MAX) == ("all_reduce(MAX)", x)
    assert read("broadcast", x, 1) == ("broadcast(src=1)", x)
    assert read("all_gather", [x, x], y)[1] is y
    assert read("reduce_scatter", y, [x])[1] is x
    assert read("barrier") == ("barrier", None)
    assert read("all_reduce") == ("all_reduce", None)  # torch will say what is missing
    for name, argument in COLLECTIVES.items():
        assert not argument or argument in signature_of(getattr(td, name)).parameters, name
    frames = [{"filename": torch.__file__, "line": 1}, {"filename": "/a/train.py", "line": 88}]
    assert line_of(frames) == "train.py:88"
    assert line_of([]) == "unknown line"


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "3"], r"--rank 3 is not one of 3 ranks; take"),
        (["--fault", "laziness"], "invalid choice"),
        (["--timeout-s", "0"], "not a finite number above 0"),
    ],
)
def test_bad_flags(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        faults.main(flags)


def test_all_faults_need_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start it with plain python"):
        faults.main(["--fault", "all"])


def test_the_recorder_must_be_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "0")
    with dist.session("cpu", timeout_s=20) as ctx, pytest.raises(UserError, match="unset it"):
        diagnose.watch(ctx)

"""Meeting, talking and leaving: what the launcher says, ranks over gloo, and every way a start can fail."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from common import dist, process, script
from common.dist import compress, first_slurm_host, read_launch
from common.script import UserError
from tests.spawn import Rank, free_port, rank_environment, run_ranks, run_script, torchrun, values

QUICK = 3.0  # seconds that a test's ranks wait for each other before they give up
END = 25.0  # far above what a failing rank needs to end, far below the sessions' default timeouts


# ---------------------------------------------------------------- what the launcher says


def test_launch_of_torchrun() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0",
           "MASTER_PORT": "1234", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}  # fmt: skip
    assert read_launch(env) == dist.Launch("torchrun", 5, 1, 8, 4, "node0", 1234)


def test_launch_of_deepspeed() -> None:
    """It says LOCAL_SIZE, and with two hosts of a rank each a job must not take itself for one of a single host."""
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_RANK": "1", "CROSS_SIZE": "2",
           "MASTER_ADDR": "host0", "MASTER_PORT": "1234"}  # fmt: skip
    assert read_launch(env) == dist.Launch("torchrun", 1, 0, 2, 1, "host0", 1234)


@pytest.mark.parametrize(
    ("env", "local_ranks", "threads"),
    [
        ({}, 2, 4),
        ({"OMP_NUM_THREADS": "3"}, 2, 3),
        ({"OMP_NUM_THREADS": "1"}, 2, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, 4),  # torchrun's own default for several ranks
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, 1),  # which it does not set for one: a choice
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, 2, 3),
    ],
)
def test_the_cores_are_shared_out(
    env: dict, local_ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch, no_launcher: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "usable_cores", lambda: 8)
    taken = [env.get("OMP_NUM_THREADS")]
    monkeypatch.setattr(torch, "set_num_threads", lambda number: taken.append(str(number)))
    dist.set_threads(dist.Launch("torchrun", local_world_size=local_ranks), None)
    assert taken[-1] == str(threads)


def test_launch_by_hand_counts_all_ranks_as_local() -> None:
    assert read_launch({"RANK": "1", "WORLD_SIZE": "2"}) == dist.Launch("torchrun", 1, 1, 2, 2, "127.0.0.1", 29500)


def test_launch_of_plain_python() -> None:
    assert read_launch({}) == dist.Launch("python")
    assert read_launch({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).launcher == "python"  # sbatch


SRUN = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[003-005,9]", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
}  # fmt: skip


def test_launch_of_srun() -> None:
    assert read_launch(SRUN) == dist.Launch("srun", 5, 1, 7, 2, "gpu003", 23456)
    last = SRUN | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}
    assert read_launch(last) == dist.Launch("srun", 6, 0, 7, 1, "gpu003", 23456)
    chosen = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert read_launch(chosen) == dist.Launch("srun", 5, 1, 7, 2, "10.0.0.1", 4000)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-007,9],login", "gpu003"),
        ("gpu[9,11-12]", "gpu9"),
        ("login,gpu[1-2]", "login"),
        ("node7", "node7"),
        ("a-b[01-02].cluster.org,c", "a-b01.cluster.org"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("10.0.0.5,10.0.0.6", "10.0.0.5"),
    ],
)
def test_first_slurm_host(nodes: str, first: str) -> None:
    assert first_slurm_host(nodes) == first


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "two", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "²", "WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "world of 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "65536"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(3)"}, "SLURM_STEP_TASKS_PER_NODE"),
        (SRUN | {"SLURM_NODEID": "x"}, "SLURM_NODEID"),
        (SRUN | {"SLURM_NODEID": "4"}, "SLURM_NODEID"),
        (SRUN | {"SLURM_JOB_ID": "12a"}, "SLURM_JOB_ID"),
        (SRUN | {"SLURM_PROCID": "7"}, "rank 7"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID"),
    ],
)
def test_contradictory_variables(env: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        read_launch(env)
    assert ";" in str(caught.value)  # what; what to do
    assert "\n" not in str(caught.value)


def test_compress() -> None:
    assert compress([5, 0, 2, 1]) == "0-2, 5"
    assert compress([3]) == "3"


def test_no_gpu_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dist.pick_device("auto", dist.Launch("python")).type == "cpu"
    with pytest.raises(UserError, match="--device cpu"):
        dist.pick_device("cuda", dist.Launch("python"))


def test_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert dist.pick_device("auto", dist.Launch("torchrun", 3, 1, 4, 2)) == torch.device("cuda", 1)
    assert dist.pick_device("cpu", dist.Launch("torchrun", 3, 1, 4, 2)) == torch.device("cpu")
    with pytest.raises(UserError, match="2 GPUs"):
        dist.pick_device("auto", dist.Launch("torchrun", 2, 2, 4, 4))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task=1
    assert dist.pick_device("auto", dist.Launch("srun", 3, 1, 4, 2)) == torch.device("cuda", 0)


# ---------------------------------------------------------------- a session that goes well


def talk() -> dict[str, Any]:
    with dist.session("cpu", join_timeout_s=30, timeout_s=30) as ctx:
        one = torch.full((3,), float(ctx.rank + 1))
        torch.distributed.all_reduce(one)
        ctx.barrier("first")
        ctx.barrier("first")  # the same label again is another barrier
        mesh = ctx.mesh(dp=-1, tp=2)
        tp_rank = mesh.get_local_rank("tp")
        mine = torch.tensor([float(ctx.rank)])
        torch.distributed.all_reduce(mine, group=mesh.get_group("tp"))
        with contextlib.suppress(UserError):
            ctx.mesh(dp=3)
            raise AssertionError("a mesh of 3 filled the world")
        gathered = ctx.gather({"rank": ctx.rank, "pid": os.getpid()})
    return {
        "rank": ctx.rank, "local_rank": ctx.local_rank, "world": ctx.world_size, "main": ctx.is_main,
        "pid": os.getpid(),
        "sum": one.tolist(), "mesh": (mesh.mesh_dim_names, tuple(mesh.shape), tp_rank),
        "tp_sum": mine.item(), "gathered": gathered, "closed": not torch.distributed.is_initialized(),
    }  # fmt: skip


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_meet_and_talk(world: int) -> None:
    found = values(run_ranks(talk, world))
    total = world * (world + 1) / 2
    for rank, seen in enumerate(found):
        assert (seen["rank"], seen["local_rank"], seen["world"], seen["main"]) == (rank, rank, world, rank == 0)
        assert seen["sum"] == [total] * 3
        assert seen["mesh"] == (("dp", "tp"), (world // 2, 2), rank % 2)
        assert seen["tp_sum"] == (rank // 2 * 2) * 2 + 1
        assert seen["closed"]
    assert found[0]["gathered"] == [{"rank": seen["rank"], "pid": seen["pid"]} for seen in found]
    assert all(seen["gathered"] == [] for seen in found[1:])


def two_sessions() -> list[float]:
    sums = []
    for offset in (1.0, 10.0):
        with dist.session("cpu", join_timeout_s=20, timeout_s=20) as ctx:
            value = torch.tensor([offset * (ctx.rank + 1)])
            torch.distributed.all_reduce(value)
            ctx.barrier("done")
            sums.append(value.item())
    return sums


def test_session_twice_in_one_process() -> None:
    assert values(run_ranks(two_sessions, 2)) == [[3.0, 30.0], [3.0, 30.0]]


LEAVES = """
import atexit, contextlib, weakref
from pathlib import Path
import torch
from common import dist, script

def gloo_threads():
    found = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended just now
            found += "gloo" in (task / "comm").read_text()
    return found

class Torn:
    def __del__(self):
        print("torn down")

torn = Torn()
atexit.register(print, "left")

def main():
    with dist.session("cpu", join_timeout_s=30, timeout_s=30):
        ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        ddp(torch.ones(1, 2)).sum().backward()
        during = gloo_threads()
    gone = weakref.ref(ddp)
    del ddp
    return {"during": during, "after": gloo_threads(), "gone": gone() is None}

script.run(main)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_gloo_is_not_taken_down_under_python(tmp_path: Path) -> None:
    """Its threads take the GIL when they drop their last tensors: whoever joins them holding it waits for ever, and one
    that is late aborts a Python that shuts down. So no destructor may run, and Python is not shut down."""
    path = tmp_path / "leaves.py"
    path.write_text(LEAVES)
    for rank in run_script(path, 2, env={"PYTHONPATH": str(Path(__file__).parents[1])}):
        assert rank.returncode == 0
        assert rank.stdout.endswith("left\n")  # what was registered for the end has run, and no more
        if rank.value:
            assert rank.value == {"during": rank.value["after"], "after": rank.value["after"], "gone": True}
            assert rank.value["after"] > 0


def alone() -> dict[str, Any]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    sums = []
    for _ in range(2):
        with dist.session("cpu") as ctx:
            value = torch.ones(2)
            torch.distributed.all_reduce(value)
            ctx.barrier("alone")
            sums += [value.tolist(), ctx.gather("x"), tuple(ctx.mesh(dp=-1).shape)]
    return {"sums": sums, "launcher": ctx.launch.launcher}


def test_plain_python_needs_no_port() -> None:
    with socket.socket() as holder:  # the default port is taken, and so is the one that the environment names
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        env = {"MASTER_PORT": str(holder.getsockname()[1]), "MASTER_ADDR": "nowhere.invalid"}
        (found,) = values(run_ranks(alone, 1, env=env))
    assert found == {"sums": [[1.0, 1.0], ["x"], (1,)] * 2, "launcher": "python"}


def leave_early(rank_1_stays_until: str) -> str:
    """Rank 0 leaves at once and then waits for rank 1, which works on until it sees that."""
    with dist.session("cpu", join_timeout_s=20, timeout_s=2) as ctx:
        if ctx.is_main:
            return "left"
        while not ctx.store.check(["left/0"]):
            pass
        if rank_1_stays_until == "the store is gone":
            with contextlib.suppress(RuntimeError):
                while True:
                    ctx.store.check(["left/0"])
            return "alone"
        ctx.store.set("late", "word")
        return ctx.store.get("late").decode()


@pytest.mark.parametrize(("until", "said"), [("rank 0 waits", "word"), ("the store is gone", "alone")])
def test_rank_0_serves_the_store_until_the_last_rank_left(until: str, said: str) -> None:
    """And where the last rank takes longer than the session's timeout, both still end well."""
    assert values(run_ranks(leave_early, 2, until, timeout_s=END)) == ["left", said]


def stay(folder: str) -> None:
    Path(folder, os.environ["RANK"]).touch()
    signal.pause()


STARTER = """
import sys
from common import ranks, script
from tests.test_common_dist import stay
script.run(lambda: ranks.values(ranks.run_ranks(stay, 2, sys.argv[1])))
"""


@pytest.mark.parametrize(("by", "code", "said"), [("INT", 130, "interrupted\n"), ("TERM", -15, ""), ("KILL", -9, "")])
def test_ranks_end_with_the_one_who_started_them(by: str, code: int, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTER, str(tmp_path)]
    with subprocess.Popen(command, cwd=process.ROOT, stderr=subprocess.PIPE, text=True) as starter:
        deadline = time.monotonic() + 90  # it imports torch first
        while len(list(tmp_path.iterdir())) < 2:
            assert starter.poll() is None
            assert time.monotonic() < deadline
        family = psutil.Process(starter.pid).children(recursive=True)
        assert len(family) >= 3  # the forkserver and two ranks
        starter.send_signal(getattr(signal, f"SIG{by}"))
        _, err = starter.communicate(timeout=30)
    assert (starter.returncode, err) == (code, said)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


# ---------------------------------------------------------------- a start that fails


def start_only(join_timeout_s: float = QUICK) -> None:
    script.run(lambda: _joined(join_timeout_s))


def _joined(join_timeout_s: float) -> dict[str, Any]:
    with dist.session("cpu", join_timeout_s=join_timeout_s, timeout_s=QUICK) as ctx:
        ctx.barrier("here")
    return {"rank": ctx.rank}


def error_line(rank: Rank) -> str:
    """The one line on stderr of a rank that ended with 2, in time."""
    assert rank.returncode == 2, (rank.returncode, rank.stderr)
    assert not rank.timed_out
    (line,) = rank.stderr.splitlines()
    assert line.startswith("error")
    assert ";" in line
    return line


def test_missing_rank_is_named() -> None:
    port = free_port()
    started = run_ranks(start_only, 4, ranks=[0, 2], env={"MASTER_PORT": str(port)}, timeout_s=END)
    for rank in started:
        line = error_line(rank)
        assert "2 of 4 ranks" in line
        assert "missing: rank 1, 3" in line
        assert f"127.0.0.1:{port}" in line


def test_rank_0_is_missing() -> None:
    port = free_port()
    (rank,) = run_ranks(start_only, 2, ranks=[1], env={"MASTER_PORT": str(port)}, timeout_s=END)
    line = error_line(rank)
    assert "[rank 1]" in line
    assert f"cannot reach rank 0 at 127.0.0.1:{port} in 3 s" in line
    assert rank.seconds < QUICK + 5


def test_wrong_address() -> None:
    port = free_port()
    env = {"MASTER_PORT": str(port), "MASTER_ADDR": "nowhere.invalid"}
    zero, one = run_ranks(start_only, 2, env=env, timeout_s=END)
    assert "missing: rank 1" in error_line(zero)
    assert f"nowhere.invalid:{port}" in error_line(zero)
    assert f"cannot reach rank 0 at nowhere.invalid:{port}" in error_line(one)
    assert max(zero.seconds, one.seconds) < QUICK + 5


def test_a_rank_claimed_twice() -> None:
    started = run_ranks(start_only, 3, 20.0, ranks=[0, 1, 1], timeout_s=END)
    lines = [error_line(rank) for rank in started]
    assert all("rank 1 is claimed by two processes" in line for line in lines)
    assert max(rank.seconds for rank in started) < 15  # nobody waits for rank 2 any longer


def test_rank_0_claimed_twice_is_a_port_in_use() -> None:
    started = run_ranks(start_only, 2, ranks=[0, 0], timeout_s=END)
    assert sorted("is in use" in error_line(rank) for rank in started) == [False, True]


def test_port_in_use() -> None:
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        port = holder.getsockname()[1]
        (rank,) = run_ranks(start_only, 1, env={"MASTER_PORT": str(port)}, timeout_s=END)
    assert f"port {port} is in use" in error_line(rank)


@pytest.mark.parametrize("sizes", [("2", "3"), ("3", "2")])
def test_world_sizes_differ(sizes: tuple[str, str]) -> None:
    started = run_ranks(
        start_only, 2, 20.0, env=lambda i: {"WORLD_SIZE": sizes[i], "LOCAL_WORLD_SIZE": sizes[i]}, timeout_s=END
    )
    for rank in started:
        assert "was told a world size of" in error_line(rank)
    assert max(rank.seconds for rank in started) < 15  # at once, not at the timeout


def test_a_stray_process_does_not_disturb_a_running_job() -> None:
    started = run_ranks(join_with_a_stray, 2, timeout_s=END)
    assert started[2:] == []
    assert values(started) == ["fine", "fine"]


def join_with_a_stray() -> str:
    """Rank 1, once joined, acts as a stray of another job that was pointed at this one's port."""
    with dist.session("cpu", join_timeout_s=10, timeout_s=10) as ctx:
        if ctx.rank == 1:
            for stray in (dist.Launch("torchrun", 1, 1, 2, 2), dist.Launch("torchrun", 2, 2, 4, 4)):
                dist._sessions = 0
                there = dist.Launch(**{**vars(stray), "address": ctx.launch.address, "port": ctx.launch.port})
                with pytest.raises(UserError):
                    dist.join(there, 2)
            assert not ctx.store.check(["left/1"])  # it would say that the true rank 1 needs the store no more
        ctx.barrier("after the stray")
    return "fine"


def test_unknown_interface() -> None:
    (rank,) = run_ranks(start_only, 1, env={"GLOO_SOCKET_IFNAME": "nosuchnic0"}, timeout_s=END)
    assert "GLOO_SOCKET_IFNAME" in error_line(rank)


# ---------------------------------------------------------------- a rank that fails later


def missing_at_barrier() -> None:
    def main() -> dict[str, Any]:
        with dist.session("cpu", join_timeout_s=20, timeout_s=QUICK) as ctx:
            ctx.barrier("everybody")
            if ctx.rank != 1:
                ctx.barrier("checkpoint")
            else:
                while not ctx.store.check([dist.FAILED]):  # alive, and not coming
                    pass
        return {}

    script.run(main)


def test_missing_rank_at_a_barrier_is_named() -> None:
    zero, one, two = run_ranks(missing_at_barrier, 3, timeout_s=END)
    for rank in (zero, two):
        assert "2 of 3 ranks reached the barrier 'checkpoint' in 3 s, missing: rank 1" in error_line(rank)
    assert one.returncode == 0


def fail_on(failing: int, waits_in: str) -> None:
    with dist.session("cpu", join_timeout_s=20, timeout_s=300) as ctx:
        torch.distributed.all_reduce(torch.ones(1))
        if ctx.rank == failing:
            raise ValueError("this rank fails")
        if waits_in == "barrier":
            ctx.barrier("never complete")
        elif waits_in == "all_reduce":
            torch.distributed.all_reduce(torch.ones(1))


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("waits_in", ["barrier", "all_reduce", "leaving"])
def test_exception_on_one_rank_ends_all(failing: int, waits_in: str) -> None:
    ranks = run_ranks(fail_on, 3, failing, waits_in, timeout_s=END)
    assert not any(rank.timed_out for rank in ranks), [rank.stderr[-500:] for rank in ranks]
    assert ranks[failing].returncode == 1
    assert "ValueError: this rank fails" in ranks[failing].stderr
    others = [rank for number, rank in enumerate(ranks) if number != failing]
    if waits_in == "leaving":
        assert [rank.returncode for rank in others] == [0, 0], [rank.stderr for rank in others]
    else:
        assert all(rank.returncode != 0 for rank in others)
    if waits_in == "barrier" and failing == 1:
        assert any("rank 1 left with an error" in rank.stderr for rank in others)


# ---------------------------------------------------------------- real processes, with torchrun and without

SCRIPT = textwrap.dedent("""
    import os, sys, torch
    from common import dist, script

    def main():
        mode = sys.argv[1]
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        with dist.session("cpu", join_timeout_s=30, timeout_s=300) as ctx:
            if mode == "fail" and ctx.rank == 1:
                raise ValueError("this rank fails")
            if mode == "fail-first" and ctx.rank == 1 and attempt == 0:
                os._exit(7)  # no word to anybody
            ctx.barrier("all here")
            value = torch.tensor([ctx.rank + 1.0])
            torch.distributed.all_reduce(value)
        threads = torch.get_num_threads()
        return {"sum": value.item(), "attempt": attempt, "launcher": ctx.launch.launcher, "threads": threads}

    script.run(main)
""")


@pytest.fixture(scope="module")
def session_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripts") / "session.py"
    path.write_text(SCRIPT)
    return path


def test_exception_on_one_rank_with_torchrun(session_script: Path) -> None:
    done = torchrun(session_script, 2, ["fail"], timeout_s=60)
    assert not done.timed_out
    assert done.returncode == 1
    assert "ValueError: this rank fails" in done.stderr
    assert done.result is None


def test_exception_on_one_rank_without_an_agent(session_script: Path) -> None:
    zero, one = run_script(session_script, 2, ["fail"], timeout_s=60)
    assert not zero.timed_out
    assert (zero.returncode, one.returncode) == (2, 1)
    assert "rank 1 left with an error" in zero.stderr.splitlines()[-1]


def test_torchrun_restarts_and_the_ranks_join_again(session_script: Path) -> None:
    done = torchrun(session_script, 2, ["fail-first"], flags=["--max-restarts=1"], timeout_s=80)
    assert done.returncode == 0, done.stderr[-3000:]
    cores = script.usable_cores()
    assert done.result == {"sum": 3.0, "attempt": 1, "launcher": "torchrun", "threads": max(1, cores // 2)}


def test_srun_variables_join(session_script: Path) -> None:
    port = str(free_port())

    def slurm(rank: int) -> dict[str, str]:
        return {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost",
                "SLURM_JOB_ID": "1", "MASTER_PORT": port, "MASTER_ADDR": "localhost"}  # fmt: skip

    ranks = run_ranks(as_slurm_task, 2, env=slurm, timeout_s=END)
    assert values(ranks) == [("srun", 0, 2, 3.0), ("srun", 1, 2, 3.0)]


def as_slurm_task() -> tuple[str, int, int, float]:
    for name in rank_environment(0, 2, 0):
        if not name.startswith("MASTER"):
            del os.environ[name]
    with dist.session("cpu", join_timeout_s=20) as ctx:
        value = torch.tensor([ctx.rank + 1.0])
        torch.distributed.all_reduce(value)
    return ctx.launch.launcher, ctx.rank, ctx.world_size, value.item()


def test_the_spawn_helper_kills_at_its_limit() -> None:
    (rank,) = run_ranks(signal.pause, 1, timeout_s=0.5)
    assert rank.timed_out
    assert rank.returncode == -signal.SIGKILL

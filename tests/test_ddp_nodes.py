"""Several nodes: launch files under a real Slurm, torchrun by hand and by ssh on virtual hosts; checks before the start."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ch02_hardware_parallelism import virtual_cluster
from ch03_ddp import preflight, preflight_checks, preflight_facts, slurm_cluster, slurm_node, ssh_launch, train_ddp
from ch03_ddp.preflight_checks import BROKEN, WARN
from ch03_ddp.preflight_facts import Facts
from common import process, script
from common.process import ROOT
from tests.spawn import free_port, run_ranks, values

LAUNCH = sorted((ROOT / "ch03_ddp/launch").iterdir())
NO_NETWORKS, NO_SLURM = virtual_cluster.why_not(), slurm_cluster.why_not()
needs_namespaces = pytest.mark.skipif(NO_NETWORKS is not None, reason=NO_NETWORKS or "")
needs_slurm = pytest.mark.skipif(NO_SLURM is not None, reason=NO_SLURM or "")
TRAIN = [
    "ch03_ddp/train_ddp.py", "--preset", "nano", "--batch-size", "1", "--seq-len", "16", "--dtype", "fp32",
    "--val-tokens", "256", "--sample-tokens", "0", "--log-every", "1", "--threads", "1", "--steps",
]  # fmt: skip
SHORT, LONG = [*TRAIN, "6"], [*TRAIN, "50"]  # LONG: something happens to it before its end
SSHD = "/usr/sbin/sshd"


def train(flags: list[str]) -> dict:
    return train_ddp.main(flags)


def alone(command: list[str], folder: Path) -> str:
    """weights_sha256 of a training run on two ranks of this host that is left alone."""
    flags = [*command[1:], "--run-dir", str(folder)]
    return str(values(run_ranks(train, 2, flags, timeout_s=90))[0]["weights_sha256"])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    return alone(SHORT, tmp_path_factory.mktemp("short"))


def results(text: str) -> list[dict]:
    return [json.loads(line.removeprefix("RESULT ")) for line in text.splitlines() if line.startswith("RESULT ")]


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        time.sleep(0.02)


def one_line(call: Callable[[], object], said: str) -> None:
    with pytest.raises(script.UserError, match="; ") as caught:
        call()
    assert said in str(caught.value)


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_launch_files_are_sound(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in ("Prerequisites", "Start", "Check", "Stop"):
        assert re.search(rf"^# {word}\b", text, re.MULTILINE), f"{path.name} does not say {word}"
    assert not re.search(r"^#\s+SBATCH|^\s+#SBATCH", text, re.MULTILINE), "Slurm would not see that"
    for name in re.findall(r"\bch0\d_\w+/[\w./-]+\.\w+", text):
        assert (ROOT / name).is_file(), f"{path.name} names {name}"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["train.sbatch", "train_srun.sbatch"])
def test_directives_come_before_the_first_command(name: str) -> None:
    """Slurm stops reading them there."""
    lines = (ROOT / "ch03_ddp/launch" / name).read_text(encoding="utf-8").splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line.split(maxsplit=1)[1] for line in lines[:first_command] if line.startswith("#SBATCH ")]
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert {"--requeue", "--open-mode=append", "--signal=USR1@120"} <= set(directives)


AGENT_SCRIPT = """
import os, signal, sys
from pathlib import Path
if sys.argv[2] == "fail":
    sys.exit(3)
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append("USR1"))
Path(sys.argv[1], os.environ["RANK"]).touch()
while not got:
    signal.pause()
Path(sys.argv[1], os.environ["RANK"] + ".told").touch()
"""


@pytest.mark.parametrize("what", ["signal", "fail"])
def test_the_agents_shell_tells_the_ranks_and_not_torchrun(what: str, tmp_path: Path) -> None:
    """As Slurm does with proctrack/cgroup: only the task itself gets the signal."""
    (tmp_path / "rank.py").write_text(AGENT_SCRIPT)
    place = {"SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "1", "SLURMD_NODENAME": "localhost", "NPROC_PER_NODE": "2"}
    env = place | {"RDZV_ENDPOINT": f"localhost:{free_port()}"}
    command = ["bash", "ch03_ddp/launch/slurm_agent.sh", str(tmp_path / "rank.py"), str(tmp_path), what]
    with process.Child(command, env=env) as shell:
        if what == "signal":
            wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), "the ranks wait for the signal")
            shell.process.send_signal(signal.SIGUSR1)
        done = shell.wait(60)
    if what == "signal":
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "0.told").exists()
        assert (tmp_path / "1.told").exists()
    else:
        assert done.returncode == 1, done.stderr


# ---------------------------------------------------------------- a real Slurm


STORY = """
set -eu
begun() { for _ in $(seq 900); do [ -s "$1" ] && return; sleep 0.1; done; echo "$1 did not begin" >&2; exit 1; }
srun --nodes=2 --label hostname
sbatch ch03_ddp/launch/train_srun.sbatch no-such-script.py
a=$(TRAIN_A); begun OUT/a/losses.jsonl
sbatch --partition=urgent --nodes=2 --exclusive --output=OUT/urgent.out --wrap='squeue -h -o "%i %T"'
b=$(TRAIN_B); begun OUT/b/losses.jsonl
scancel --signal=USR1 $b
while squeue -h -o %T | grep -q .; do sleep 0.5; done
c=$(TRAIN_C); begun OUT/c/losses.jsonl
scancel $c
echo "a=$a b=$b c=$c"
"""


@needs_slurm
def test_a_slurm_of_two_nodes(tmp_path: Path) -> None:
    """Preempted, signalled, cancelled: one story, as each start of the cluster and of a job costs seconds."""
    out = tmp_path / "with a space"
    (out / "a").mkdir(parents=True)
    story = STORY.replace("OUT", f"'{out}'")
    for name, launch in (("A", "train.sbatch"), ("B", "train_srun.sbatch"), ("C", "train_srun.sbatch")):
        words = [*LONG, "--out", f"'{out / name.lower()}'", "--resume", "auto", "--run-dir", f"'{out / name}'"]
        story = story.replace(f"TRAIN_{name}", f"sbatch --parsable ch03_ddp/launch/{launch} {' '.join(words)}")
    log = tmp_path / "cluster"
    line = [sys.executable, "-m", "ch03_ddp.slurm_cluster", "--rate", "10gbit", "--run-dir", str(log)]
    done = process.run([*line, "--", "bash", "-c", story], timeout_s=240)
    reference = alone(LONG, tmp_path / "alone")
    assert "0: host0" in done.stdout, done.stderr
    assert "1: host1" in done.stdout
    assert done.returncode == 1, "a job failed, on purpose"
    ids = dict(re.findall(r"\b([abc])=(\d+)", done.stdout))
    ends = {
        job: (state, int(restarts))
        for job, state, restarts in re.findall(r"job (\d+) \S+: (\w+).*restarts (\d+)", done.stderr)
    }
    output = {name: (log / f"train-{job}.out").read_text() for name, job in ids.items()}

    failed = next(path.read_text() for path in log.glob("train-*.out") if "no-such-script" in path.read_text())
    assert failed.startswith("error: there is no script 'no-such-script.py'")
    for name in "ab":  # preempted by a job of the urgent partition, and signalled by hand
        assert ends[ids[name]] == ("COMPLETED", 1), done.stderr
        before, after = results(output[name])
        assert before["preempted"]
        assert not after["preempted"]
        assert 0 < before["steps"] < 50
        assert after["resumed_at_step"] == before["steps"]
        assert after["weights_sha256"] == reference
    urgent = (out / "urgent.out").read_text()
    assert f"{ids['a']} PENDING" in urgent, "the nodes were taken away from it"
    (left,) = results(output["c"])
    assert left["preempted"]
    assert ends[ids["c"]] == ("CANCELLED", 0), "a cancelled job must not come back"


def ours(mark: str) -> list[psutil.Process]:
    found = []
    for one in psutil.process_iter():
        try:
            if mark in one.environ().values():
                found.append(one)
        except (psutil.Error, OSError):
            continue
    return found


@needs_slurm
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_the_cluster(how: signal.Signals, tmp_path: Path) -> None:
    ready, mark = tmp_path / "ready", f"mark-{tmp_path.name}-{os.getpid()}"
    before = sorted(slurm_node.HOME.iterdir())
    line = [sys.executable, "-m", "ch03_ddp.slurm_cluster", "--run-dir", str(tmp_path / "run"), "--"]
    command = [*line, "sh", "-c", f"sbatch --wrap='sleep 1000'; touch '{ready}'; sleep 1000"]
    launcher = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"A_MARK": mark}, stderr=subprocess.DEVNULL)
    try:
        wait_for(ready.exists, "the cluster is up")
        names = {one.name() for one in ours(mark)}
        assert {"munged", "slurmctld", "slurmd"} <= names
        launcher.send_signal(how)
        launcher.wait(30)
        wait_for(lambda: not ours(mark), f"gone: {ours(mark)}", 30)
    finally:
        launcher.kill()
    assert sorted(slurm_node.HOME.iterdir()) == before


def test_slurm_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_cluster, "environment", lambda: {"PATH": str(tmp_path)})
    one_line(lambda: slurm_cluster.main(["--", "true"]), "not found; install slurm-wlm and munge (make system-deps)")
    one_line(lambda: slurm_cluster.main([]), "munged, slurmctld, slurmd")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--", "no COMMAND behind the --"),
        ("--nodes 0", "0 is below 1"),
        ("--rate fast", "'fast' is not like 100mbit"),
        ("srun hostname", "unrecognized arguments"),
    ],
)
def test_bad_words_for_slurm(line: str, said: str) -> None:
    one_line(lambda: slurm_cluster.main(line.split()), said)


@needs_slurm
def test_a_command_that_is_not_there() -> None:
    one_line(lambda: slurm_cluster.main(["--", "no-such-command"]), "there is no command no-such-command")


def test_a_job_is_read_from_what_scontrol_shows() -> None:
    line = (
        "JobId=7 JobName=a name UserId=x(0) JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 Restarts=2 "
        "BatchFlag=1 TRES=cpu=2,mem=1G NtasksPerN:B:S:C=1:0:*:* Command=/a b/c.sh StdErr=/a b/x.out StdOut=/a b/x.out Power="
    )
    job = slurm_node.Job.parse(line)
    assert job == slurm_node.Job("7", "a name", "PENDING", "BeginTime", 2, Path("/a b/x.out"))


# ---------------------------------------------------------------- virtual hosts: by hand, and by ssh

BY_HAND = """
set -eu
export NNODES=2 NODE_RANK="$HOST_INDEX" MASTER_ADDR=host0 RDZV_ENDPOINT=host0:29400
bash ch03_ddp/launch/torchrun_static.sh {train} --run-dir '{out}/static'
bash ch03_ddp/launch/torchrun_c10d.sh {train} --run-dir '{out}/c10d'
"""
BY_SSH = """
set -eu
if [ "$HOST_INDEX" = 0 ]; then
    mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && touch '{keys}/mounted'
fi
until [ -e '{keys}/mounted' ]; do sleep 0.05; done
{sshd} -D -e -f '{keys}/sshd_config' &
if [ "$HOST_INDEX" = 0 ]; then
    python -m ch03_ddp.ssh_launch --hosts host0,host1 --ranks 1 --timeout-s 100 --ssh "ssh -F '{keys}/config'" \
        -- {train} --run-dir '{out}/ssh' && touch '{keys}/done'
else
    until [ -e '{keys}/done' ]; do sleep 0.2; done
fi
kill %1
"""


@needs_namespaces
def test_two_hosts_by_hand_give_what_two_ranks_give(tmp_path: Path, short: str) -> None:
    command = BY_HAND.format(train=" ".join(SHORT), out=tmp_path / "a b")
    done = virtual_cluster.run(["bash", "-c", command], rate="10gbit", launch="command", timeout_s=150)
    assert done.returncode == 0, done.stderr
    static, c10d = results(done.stdout)
    for result in (static, c10d):
        assert result["world_size"] == 2
        assert result["weights_sha256"] == short
    assert "joined  world_size=2 device=cpu backend=gloo launcher=torchrun" in done.stderr


@needs_namespaces
@pytest.mark.skipif(os.geteuid() != 0 or not Path(SSHD).exists(), reason="needs root and openssh-server")
def test_two_hosts_by_a_real_ssh(tmp_path: Path, short: str) -> None:
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    (keys / "sshd_config").write_text(
        f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nStrictModes no\nPidFile none\nPermitRootLogin yes\n"
        "UsePAM no\nPort 2222\n"
    )
    (keys / "config").write_text(
        f"Host *\n  Port 2222\n  IdentityFile {keys}/user\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        "  BatchMode yes\n  LogLevel ERROR\n  ConnectionAttempts 20\n"
    )
    command = BY_SSH.format(keys=keys, sshd=SSHD, train=" ".join(SHORT), out=tmp_path)
    done = virtual_cluster.run(["bash", "-c", command], rate="10gbit", launch="command", timeout_s=120)
    assert done.returncode == 0, done.stderr
    (result,) = results(done.stdout)
    assert result["world_size"] == 2
    assert result["weights_sha256"] == short


# ---------------------------------------------------------------- ssh_launch, with a stand-in for ssh

STAND_IN = '#!/bin/sh\nexec env -i HOME="$HOME" PATH="$PATH" sh -c "$2"\n'
SSH_SCRIPT = """
import os, sys, time
from pathlib import Path
folder, what, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
(folder / f"{rank}.partial").write_text(str(os.getpid()))
(folder / f"{rank}.partial").rename(folder / f"{rank}.pid")
while len(list(folder.glob("*.pid"))) < 2:
    time.sleep(0.02)
print("rank", rank, "has", os.environ.get("NCCL_DEBUG"), os.environ.get("A b"[0]), flush=True)
if what == "fail" and rank == "1":
    sys.exit("out of luck")
time.sleep(1000)
"""


@pytest.fixture
def two_hosts(tmp_path: Path) -> list[str]:
    """The command line that starts SSH_SCRIPT on "hosts" one and two."""
    (tmp_path / "fake ssh").write_text(STAND_IN)
    (tmp_path / "fake ssh").chmod(0o755)
    (tmp_path / "rank.py").write_text(SSH_SCRIPT)
    flags = ["--hosts", "one,two", "--ranks", "1", "--master-addr", "127.0.0.1", "--port", str(free_port())]
    ssh = ["--ssh", f"'{tmp_path}/fake ssh'", "--env", "A=x y 'z"]
    return [sys.executable, "-m", "ch03_ddp.ssh_launch", *flags, *ssh]


def both_gone(folder: Path) -> bool:
    return not any(psutil.pid_exists(int((folder / f"{rank}.pid").read_text())) for rank in (0, 1))


def test_a_host_that_fails_stops_the_others(two_hosts: list[str], tmp_path: Path) -> None:
    command = [*two_hosts, "--", str(tmp_path / "rank.py"), str(tmp_path), "fail"]
    done = process.run(command, timeout_s=90, env={"NCCL_DEBUG": "WARN"})
    assert done.returncode == 1
    assert "error: two failed (exit code 1); the others are stopped" in done.stderr
    assert "[two] out of luck" in done.stderr
    assert "rank 0 has WARN x y 'z" in done.stdout.splitlines()
    assert "[two] rank 1 has WARN x y 'z" in done.stderr.splitlines()
    assert both_gone(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_launcher_that_ends_takes_all_with_it(how: signal.Signals, two_hosts: list[str], tmp_path: Path) -> None:
    command = [*two_hosts, "--", str(tmp_path / "rank.py"), str(tmp_path), "stay"]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (tmp_path / "0.pid").exists() and (tmp_path / "1.pid").exists(), "both ranks run")
        launcher.send_signal(how)
        launcher.wait(60)
        wait_for(lambda: both_gone(tmp_path), "both ranks have ended", 45)
    finally:
        launcher.kill()
    assert launcher.returncode == (130 if how == signal.SIGINT else -9)


def test_a_limit_of_time(two_hosts: list[str], tmp_path: Path) -> None:
    command = [*two_hosts, "--timeout-s", "1", "--", str(tmp_path / "rank.py"), str(tmp_path), "stay"]
    done = process.run(command, timeout_s=90)
    assert done.returncode == 124
    assert "error: not done after 1 s; pass a larger --timeout-s" in done.stderr
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or [])]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--hosts host.invalid -- ch03_ddp/train_ddp.py", "unknown host host.invalid"),
        ("--hosts a,a -- ch03_ddp/train_ddp.py", "a is in the list twice"),
        ("--hosts a;b -- ch03_ddp/train_ddp.py", "'a;b' is no host"),
        ("--hosts -oProxyCommand=x -- ch03_ddp/train_ddp.py", "expected one argument"),
        ("--hosts @no-such-file -- ch03_ddp/train_ddp.py", "cannot read the hosts in no-such-file"),
        ("--hosts a -- no-such.py", "there is no script no-such.py"),
        ("--hosts a", "no SCRIPT"),
        ("--hosts a --ranks many -- ch03_ddp/train_ddp.py", "--ranks many is neither a number nor auto"),
        ("--hosts a --ssh no-such-ssh -- ch03_ddp/train_ddp.py", "there is no no-such-ssh here"),
        ("--hosts a --env 1=2 -- ch03_ddp/train_ddp.py", "--env '1=2' is not NAME=VALUE"),
        ("--hosts localhost,b -- ch03_ddp/train_ddp.py", "the other hosts cannot find localhost"),
        ("--hosts a --port 0 -- ch03_ddp/train_ddp.py", "0 is below 1"),
    ],
)
def test_bad_words_for_ssh(line: str, said: str) -> None:
    one_line(lambda: ssh_launch.main(line.split()), said)


@pytest.mark.parametrize(("flags", "threads"), [([], "4"), (["--env", "OMP_NUM_THREADS=3"], "3")])
def test_hosts_that_are_one_machine_share_its_cores(
    flags: list[str], threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = SimpleNamespace(stdin=io.BytesIO(), stdout=[], stderr=[], wait=lambda *_: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(script, "usable_cores", lambda: 8)
    monkeypatch.setattr(ended.stdin, "close", lambda: None)
    monkeypatch.setattr(ssh_launch.subprocess, "Popen", lambda *_, **__: ended)
    with pytest.raises(SystemExit):
        ssh_launch.main(["--ssh", "local", "--hosts", "one,two", *flags, "--", "ch03_ddp/train_ddp.py"])
    told = [json.loads(line) for line in ended.stdin.getvalue().splitlines()]
    assert [words["env"]["OMP_NUM_THREADS"] for words in told] == [threads, threads]


def test_hosts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# the rack\nnode1\nme@node2  # slow\n\n10.0.0.3\n")
    assert ssh_launch.host_list(f"@{tmp_path}/hosts") == ["node1", "me@node2", "10.0.0.3"]


# ---------------------------------------------------------------- checks before the start


def facts(host: str, **other: object) -> Facts:
    """A healthy node."""
    values = {
        "interface": "eth0",
        "address": "10.0.0.1",
        "mtu": 9000,
        "speed_mbit": 100_000,
        "own_name_is": ["10.0.0.1"],
    }
    values |= {"interfaces": ["docker0", "eth0", "ib0", "lo"], "gloo": None, "nccl": None, "shm_gib": 16.0}
    values |= {"disk_gib": 100.0, "open_files": 65536, "gpus": ["H100"] * 8}
    return Facts(host, 0, 8, {"torch": "2.13.0", "python": "3.11.7", "commit": "abc"}, **(values | other))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "verdict", "found", "fix"),
    [
        ({"versions": {"torch": "2.12", "python": "3.11.7", "commit": "abc"}}, BROKEN, "b has torch 2.12, the others 2.13.0", ""),
        ({"versions": {"torch": "2.13.0", "python": "3.11.7"}}, BROKEN, "b has commit (none)", "check out one commit"),
        ({"gpus": ["A100"] * 8}, BROKEN, "b has 8 x A100, the others 8 x H100", "nvidia-smi"),
        ({"interface": "docker0"}, BROKEN, "b: the way to the other nodes leaves through docker0", "MASTER_ADDR"),
        ({"own_name_is": ["127.0.1.1"]}, BROKEN, "b: its own name means 127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"),
        ({"own_name_is": []}, BROKEN, "b: its own name means nothing", "GLOO_SOCKET_IFNAME=eth0"),
        ({"gloo": "eth1"}, BROKEN, "there is no eth1; it has docker0, eth0, ib0, lo", "set it to eth0"),
        ({"gloo": "et"}, BROKEN, "there is no et", ""),  # gloo knows whole names only
        ({"nccl": "=et"}, BROKEN, "NCCL_SOCKET_IFNAME==et, and there is no et", ""),
        ({"nccl": "docker"}, BROKEN, "NCCL_SOCKET_IFNAME=docker, which leads to no other node", ""),
        ({"mtu": 1500}, WARN, "b: eth0 has mtu 1500, the others 9000", ""),
        ({"speed_mbit": 1000}, WARN, "b: eth0 has speed_mbit 1000, the others 100000", ""),
        ({"clock_ms": -450.0, "clock_pm_ms": 2.0}, WARN, "b: its clock is -450 ms (± 2) off", "chrony"),
        ({"shm_gib": 0.0625}, WARN, "b: /dev/shm holds 0.06 GiB", "--shm-size"),
        ({"disk_gib": 0.1}, BROKEN, "b: 0.1 GiB are free", "make room"),
        ({"open_files": 1024}, WARN, "b: 1024 open files", "ulimit -n"),
        ({"attention": ["memlock: 8 MiB; set it"]}, WARN, "b: memlock: 8 MiB", ""),
    ],
)  # fmt: skip
def test_each_fault_is_named_with_its_node(other: dict, verdict: str, found: str, fix: str) -> None:
    odd = facts("b")
    for name, value in other.items():
        setattr(odd, name, value)
    nodes = [facts("a"), odd, facts("c")]
    said = [c for c in preflight_checks.all_checks(nodes, nodes, cuda=True, clock_bound_ms=100) if c.verdict != "ok"]
    assert [check.verdict for check in said] == [verdict]
    assert found in said[0].found
    assert fix in said[0].fix


@pytest.mark.parametrize(
    "other",
    [
        {"gloo": "eth0"},
        {"nccl": "et"},
        {"nccl": "ib0,eth"},
        {"nccl": "^docker"},
        {"clock_ms": 101.0, "clock_pm_ms": 5.0},
    ],
)
def test_what_is_no_fault(other: dict) -> None:
    nodes = [facts("a"), facts("b", **other)]
    assert {c.verdict for c in preflight_checks.all_checks(nodes, nodes, cuda=True, clock_bound_ms=100)} == {"ok"}


def test_a_port_that_another_machine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection alone proves little: the word that comes back must be the node's own."""

    class Store(dict):
        def said(self, label: str, word: str) -> list[str]:
            if label == "ports":
                with_other = json.loads(word)
                return [word, json.dumps([*with_other[:2], "0" * 32])]  # the other node's port is ours, by mistake
            return [word]

    ctx = type("Ctx", (), {"exchange": Store().said})()
    nodes = [facts("a", address="127.0.0.1"), facts("b")]
    monkeypatch.setattr(preflight_facts, "addresses_of", lambda name: ["127.0.0.1"])
    (check,) = preflight.try_pairs(ctx, 0, nodes, 5)
    assert check.verdict == BROKEN
    assert re.fullmatch(r"a -> b: 127\.0\.0\.1:\d+ is answered by another machine", check.found)


def test_no_way_to_a_host() -> None:
    one_line(lambda: preflight_facts.find_interface(facts("me"), "host.invalid"), "me knows no way to host.invalid")


def test_the_interface_of_a_way() -> None:
    me = facts("me")
    preflight_facts.find_interface(me, "127.0.0.1")
    assert me.address == "127.0.0.1"
    assert me.interface in [name for _, name in socket.if_nameindex()]
    assert me.interface.startswith("lo")


FAULTS = """
[ "$HOST_INDEX" = 1 ] && ip route add blackhole 10.77.0.3
export RANK="$HOST_INDEX" LOCAL_RANK=0 WORLD_SIZE=3 LOCAL_WORLD_SIZE=1 MASTER_ADDR=host0 MASTER_PORT=29500
exec python ch03_ddp/preflight.py --plant version,clock,interface --connect-timeout-s 2 --run-dir '{out}'
"""


@needs_namespaces
def test_planted_faults_are_found_on_three_hosts(tmp_path: Path) -> None:
    command = FAULTS.format(out=tmp_path)
    done = virtual_cluster.run(["bash", "-c", command], hosts=3, launch="command", timeout_s=120)
    assert done.returncode == 2, done.stderr
    assert done.result is not None, done.stderr
    assert done.result["verdict"] == "broken"
    versions, interface, *pairs = done.result["broken"]
    assert re.fullmatch(r"versions: host2 has torch \S+\.planted, the others \S+", versions)
    assert interface == "interface: host2: GLOO_SOCKET_IFNAME=lo, which leads to no other node"
    there, back = pairs
    assert there.startswith("connect: host1 -> host2: 10.77.0.3:")
    assert re.fullmatch(r"connect: host2 -> host1: 10\.77\.0\.2:\d+ timed out", back)
    (clock,) = done.result["warnings"]
    assert re.match(r"clock: host2: its clock is \+(49[5-9]\d|50[0-4]\d) ms", clock)
    assert done.result["all_reduce_ms"] is None, "no collective where it would hang"
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1, "one line, from rank 0"
    assert "(and 3 more, see above); install the same (make setup) on all nodes" in errors[0]
    assert (tmp_path / "result.json").exists()


@needs_namespaces
def test_healthy_hosts_are_ready(tmp_path: Path) -> None:
    command = ["ch03_ddp/preflight.py", "--run-dir", str(tmp_path)]
    done = virtual_cluster.run(command, hosts=2, ranks=2, timeout_s=100)
    assert done.result is not None, done.stderr
    assert done.result["verdict"] == "ready"
    assert done.result["broken"] == done.result["warnings"] == []
    assert [done.result[name] for name in ("nodes", "world_size", "interfaces")] == [2, 4, ["eth0", "eth0"]]
    assert done.result["all_reduce_ms"] > 0
    assert done.result["clock_offset_ms_max"] < 50


def test_the_result_is_the_last_line_whoever_spoke_after_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "job.out"
    log.write_text('step 1\nRESULT {"a": 1}\n')
    slurm_node.repeat_result([log])
    assert capsys.readouterr().out == ""
    log.write_text('RESULT {"a": 1}\n[W] recvVector failed\n')
    slurm_node.repeat_result([log])
    assert capsys.readouterr().out == 'RESULT {"a": 1}\n'

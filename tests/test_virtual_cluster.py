"""The virtual cluster: rates, names, launches, exit codes; and nothing left of it, whatever is killed and when."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ch02_hardware_parallelism import virtual_cluster, virtual_hosts
from common import exercises, process, script
from common.process import ROOT

REASON = virtual_cluster.why_not()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=REASON or "")
CLI = [sys.executable, "-m", "ch02_hardware_parallelism.virtual_cluster"]


def cli(*flags: str, before: tuple[str, ...] = (), timeout_s: float = 60) -> process.Finished:
    return process.run([*before, *CLI, *flags], timeout_s=timeout_s)


def error_line(done: process.Finished) -> str:
    """The one line of a mistake, which has created nothing."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "; " in line
    assert done.stdout == ""
    return line


# ---------------------------------------------------------------- rates and bad input


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("100mbit", 12.5e6), ("1gbit", 125e6), ("1Gbit", 125e6), ("2.5gbit", 312.5e6), ("800000", 1e5),
        ("12.5mbps", 12.5e6), ("1mibit", 2**20 / 8), ("50kibps", 50 * 2**10), ("100kbit", 12500), ("100gbit", 12.5e9),
    ],
)  # fmt: skip
def test_rates_are_in_the_units_of_tc(text: str, bytes_per_s: float) -> None:
    assert virtual_cluster.parse_rate(text) == pytest.approx(bytes_per_s)


BAD_RATES = ["0", "0mbit", "-1mbit", "", "fast", "1gbot", "nan", "inf", "1e3", "10ibit", "1kbit", "1tbit", "1 000kbit"]


@pytest.mark.parametrize("text", BAD_RATES)
def test_what_is_not_a_rate(text: str) -> None:
    with pytest.raises(script.UserError, match=r"rate.*; "):
        virtual_cluster.parse_rate(text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--rate 0", "a rate of 0 cannot be shaped"),
        ("--rate 1gbot", "'1gbot' is not like 100mbit"),
        ("--racks 2 --uplink-rate 0", "a rate of 0 cannot be shaped"),
        ("--hosts 0", "--hosts: 0 is below 1"),
        ("--ranks 0", "--ranks: 0 is below 1"),
        ("--hosts 1000", "too many for one machine"),
        ("--hosts 3 --racks 2", "3 hosts do not fill 2 racks"),
        ("--hosts 2 --racks 4", "2 hosts do not fill 4 racks"),
        ("--uplink-rate 1gbit -- x.py", "there is one rack"),
        ("--timeout-s 0", "not a finite number above 0"),
        ("--launch ssh", "invalid choice: 'ssh'"),
        ("x.py", "unrecognized arguments: x.py"),
        ("--", "no COMMAND"),
        ("--launch torchrun", "no COMMAND"),
        ("--hosts 1", "one host has no link to check"),
        ("--on 1 -- x.py", "--on 1 picks one of 2 hosts for --launch command"),
        ("--launch command --on 2 -- true", "--on 2 picks one of 2 hosts"),
        ("--launch command -- no-such-command", "there is no command no-such-command"),
        ("-- no-such.py", "there is no script no-such.py"),
        ("--launch torchrun -- no-such.py", "there is no script no-such.py"),
        ("-- true", "take --launch command for 'true'"),
        ("-- -m no.such.module", "there is no module no.such.module"),
        ("-- -m", "there is no module"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(line: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_yet(*_: object, **__: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(virtual_cluster, "why_not", not_yet)
    with pytest.raises(script.UserError, match="; ") as caught:
        virtual_cluster.main(line.split())
    assert said in str(caught.value)


@pytest.mark.parametrize("launched", ["RANK", "SLURM_STEP_NUM_TASKS"])
def test_ranks_make_no_cluster(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launched, "1")
    with pytest.raises(script.UserError, match="starts its own ranks; start this with plain python"):
        virtual_cluster.main(["--launch", "command", "--", "true"])


def test_a_mistake_is_one_line() -> None:
    assert "fill 2 racks" in error_line(cli("--hosts", "3", "--racks", "2"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("absent", virtual_cluster.TOOLS)
def test_a_tool_that_is_not_installed(absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in {*virtual_cluster.TOOLS} - {absent}:
        (tmp_path / tool).symlink_to("/bin/true")
    monkeypatch.setattr(virtual_cluster, "environment", lambda: {"PATH": str(tmp_path)})
    reason = virtual_cluster.why_not()
    assert reason == f"{absent} not found; install iproute2 and util-linux (make system-deps)"


@needs_namespaces
def test_a_python_that_cannot_be_started_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("may be read, not executed")
    monkeypatch.setattr(virtual_cluster.sys, "executable", str(tmp_path / "python"))
    reason = virtual_cluster.why_not() or ""
    assert "this Python cannot be started inside" in reason
    assert "Permission denied" in reason
    assert "; take one" in reason


def test_the_trial_needs_no_tool_that_is_not_asked_for() -> None:
    text = virtual_hosts.MOUNTS + virtual_cluster.TRIAL
    used = set(re.findall(r"(?:^|&&)\s*(\w+)", text, re.MULTILINE))
    assert len(used) > 4
    assert used <= {*virtual_cluster.TOOLS, "printf"}  # which is the shell's own


def test_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_cluster.sys, "platform", "darwin")
    assert "run this on Linux" in (virtual_cluster.why_not() or "")


@needs_namespaces
def test_without_the_right_to_make_namespaces() -> None:
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    before = ("unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh")
    if process.run(["unshare", "--user", "--map-root-user", "setpriv", "-h"], timeout_s=10).returncode:
        pytest.skip("needs user namespaces and setpriv")
    line = error_line(cli("--launch", "command", "--", "true", before=before))
    assert "user namespaces are switched off" in line
    assert "run it as root, or sudo sysctl -w user.max_user_namespaces=10000" in line


def test_the_need_of_an_exercise() -> None:
    assert (exercises.missing_for("netns") == "") == (REASON is None)


# ---------------------------------------------------------------- links


@pytest.mark.alone
@needs_namespaces
@pytest.mark.parametrize(("rate", "slowest"), [("100mbit", 0.7), ("1gbit", 0.2)])
def test_a_link_has_its_rate(rate: str, slowest: float, tmp_path: Path) -> None:
    done = cli("--rate", rate, "--run-dir", str(tmp_path))
    assert done.result, done.stderr
    assert slowest < done.result["rate_ratio"] <= 1.05
    at_the_rate_ms = 64 * 1024 / virtual_cluster.parse_rate(rate) * 1e3
    assert done.result["message_64kib_ms"] > 0.7 * at_the_rate_ms, "the bucket hides what a small message costs"
    assert done.result["rtt_ms"] < 50
    assert "└── " in done.stdout
    assert (tmp_path / "result.json").exists()


@pytest.mark.alone
@needs_namespaces
def test_a_thin_uplink_is_felt_between_racks_only(tmp_path: Path) -> None:
    sizes = ["--hosts", "4", "--racks", "2", "--rate", "200mbit", "--uplink-rate", "20mbit"]
    done = cli(*sizes, "--run-dir", str(tmp_path))
    assert done.result, done.stderr
    assert done.result["far_link_mbit"] == 20
    assert 10 < done.result["far_measured_mbit"] <= 21
    assert 60 < done.result["measured_mbit"] <= 210


def test_hosts_are_dealt_to_racks_in_blocks() -> None:
    cluster = virtual_cluster.Cluster(hosts=6, racks=3, uplink_bytes_per_s=1e6)
    assert cluster.rack_of_host == [0, 0, 1, 1, 2, 2]
    assert [cluster.link_bytes_per_s(0, other) for other in (1, 2)] == [125e6, 1e6]
    drawn = virtual_cluster.draw(cluster)
    assert [drawn.count(word) for word in ("spine", "── rack", "── host")] == [1, 3, 6]


# ---------------------------------------------------------------- what runs inside

LOOK = """
import json, os, socket
from ch02_hardware_parallelism import virtual_cluster as vc
cluster = vc.described()
words = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "HOST_INDEX", "GLOO_SOCKET_IFNAME")
seen = {name: os.environ.get(name) for name in words}
seen["names"] = [socket.gethostbyname(f"host{host}") for host in range(cluster.hosts)]
seen["peer_name"] = socket.gethostbyaddr("10.77.0.2")[0]
seen["me"] = socket.gethostname()
seen["nic_bytes"] = vc.nic_bytes()
seen["interfaces"] = [name for _, name in socket.if_nameindex()]
seen["rack_of_host"] = cluster.rack_of_host
print("RESULT " + json.dumps(seen))
"""


@needs_namespaces
def test_ranks_of_a_plain_launch(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    done = virtual_cluster.run([str(tmp_path / "look.py")], hosts=2, ranks=2, racks=2, rate="50mbit", timeout_s=60)
    assert done.returncode == 0, done.stderr
    here = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines()]
    there = [json.loads(line.removeprefix("[host1] RESULT ")) for line in done.stderr.splitlines()]
    assert sorted(seen["RANK"] for seen in here) == ["0", "1"]
    assert sorted(seen["RANK"] for seen in there) == ["2", "3"]
    assert sorted(seen["LOCAL_RANK"] for seen in there) == ["0", "1"]
    for seen in here + there:
        assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"], seen["MASTER_ADDR"]) == ("4", "2", "host0")
        assert seen["me"] == f"host{seen['HOST_INDEX']}"
        assert seen["names"] == ["10.77.0.1", "10.77.0.2"]
        assert seen["peer_name"] == "host1"
        assert sorted(seen["interfaces"]) == ["eth0", "lo"]
        assert seen["GLOO_SOCKET_IFNAME"] == "eth0"
        assert all(0 <= count < 1e6 for count in seen["nic_bytes"])
        assert seen["rack_of_host"] == [0, 1]


def test_gpus_are_dealt_out_if_there_is_one_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(visible: str | None, there: int) -> list[str]:
        monkeypatch.setattr(virtual_hosts, "gpu_names", lambda: ["a GPU"] * there)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        cluster = virtual_cluster.Cluster(hosts=2, ranks=2)
        return [virtual_hosts.gpus_of(host, cluster)["CUDA_VISIBLE_DEVICES"] for host in (0, 1)]

    assert seen(None, 4) == ["0,1", "2,3"]
    assert seen(None, 8) == ["0,1", "2,3"]
    assert seen("7,5,3,1", 4) == ["7,5", "3,1"]
    assert seen(None, 3) == seen(None, 0) == seen("", 0) == seen("0,1", 2) == ["", ""]


def test_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTUAL_CLUSTER", raising=False)
    assert virtual_cluster.described() is None


ALL_REDUCE = """
import os, socket, torch, torch.distributed as td
from ch02_hardware_parallelism import virtual_cluster
from common import dist, script
def main():
    with dist.session("cpu") as ctx:
        td.barrier()
        before = virtual_cluster.nic_bytes()
        x = torch.arange(2**18, dtype=torch.float32) + ctx.rank
        td.all_reduce(x)
        right = torch.equal(x, 2 * torch.arange(2**18, dtype=torch.float32) + 1)
        sent, received = (after - b for after, b in zip(virtual_cluster.nic_bytes(), before))
        ctx.barrier("counted")
        return {"right": right, "names": ctx.exchange("name", socket.gethostname()), "sent": sent, "received": received,
                "launcher": os.environ.get("TORCHELASTIC_RUN_ID")}
script.run(main)
"""


@needs_namespaces
def test_torchrun_meets_over_the_network(tmp_path: Path) -> None:
    (tmp_path / "reduce.py").write_text(ALL_REDUCE)
    done = virtual_cluster.run([str(tmp_path / "reduce.py")], launch="torchrun", timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert done.result, done.stdout
    assert done.result["right"] is True
    assert done.result["names"] == ["host0", "host1"]
    assert done.result["launcher"] == "virtual-cluster"
    for way in (
        "sent",
        "received",
    ):  # 2 (N-1)/N of 1 MiB, and headers; the other rank's last frames may be on their way
        assert 0.9 * 2**20 < done.result[way] < 1.2 * 2**20


@needs_namespaces
def test_exit_codes_and_prefixes(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(
        "import os, sys, time\nprint('said', os.environ['RANK'], flush=True)\nprint('complained', file=sys.stderr)\n"
        "if os.environ['RANK'] == '1':\n    print('error: no such thing; leave it', file=sys.stderr)\n    sys.exit(2)\n"
        "time.sleep(60)\n"
    )
    heard: list[str] = []
    done = virtual_cluster.run([str(tmp_path / "fail.py")], timeout_s=50, on_line=heard.append)
    assert done.returncode == 2
    assert done.seconds < 30, "the other host was not stopped"
    assert heard == ["said 0"]
    lines = done.stderr.splitlines()
    for line in (
        "[host0] complained",
        "[host1] complained",
        "[host1] said 1",
        "[host1] error: no such thing; leave it",
    ):
        assert line in lines
    assert any(line.startswith("[cluster] host1 rank 1 ended with exit code 2") for line in lines)


@needs_namespaces
def test_a_command_on_one_host() -> None:
    done = cli("--launch", "command", "--on", "1", "--", "sh", "-c", "hostname; kill -9 $$")
    assert done.returncode == 137
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["[host1] host1", "[cluster] host1 was killed by signal 9"]


@needs_namespaces
def test_what_is_left_running_does_not_keep_the_cluster() -> None:
    done = cli("--launch", "command", "--on", "0", "--", "sh", "-c", "sleep 600 & echo left", timeout_s=30)
    assert (done.returncode, done.stdout, done.timed_out) == (0, "left\n", False)


@needs_namespaces
def test_time_limits() -> None:
    done = cli("--timeout-s", "1", "--launch", "command", "--", "sleep", "600")
    assert done.returncode == 124
    assert done.stderr.splitlines() == ["error: not done after 1 s; pass a larger --timeout-s"]
    assert virtual_cluster.run(["sleep", "600"], launch="command", timeout_s=1).timed_out


# ---------------------------------------------------------------- without root

SHAPED = "tc qdisc show dev eth0; id -u; python -c 'import socket; print(socket.gethostbyname(\"host1\"))'"
NOBODY = ("unshare", "--user", "--map-user=65534", "--map-group=65534")
# A /proc with something mounted over a part of it: the kernel then refuses a new one in a user namespace, as it does in
# many containers.
COVERED = (
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs t /proc/fs && exec "$@"',
    "sh",
)


@needs_namespaces
@pytest.mark.parametrize("before", [NOBODY, (*COVERED, *NOBODY)], ids=["user", "no-proc"])
def test_without_root(before: tuple[str, ...]) -> None:
    if process.run([*before, "unshare", "--user", "true"], timeout_s=10).returncode:
        pytest.skip("needs user namespaces")
    done = cli("--rate", "100mbit", "--launch", "command", "--on", "0", "--", "sh", "-c", SHAPED, before=before)
    assert done.returncode == 0, done.stderr
    qdisc, uid, peer = done.stdout.splitlines()
    assert "tbf" in qdisc
    assert "rate 100Mbit" in qdisc
    assert (uid, peer) == ("0", "10.77.0.2")


# ---------------------------------------------------------------- nothing is left

_marks = itertools.count()


def living(mark: str) -> dict[int, str]:
    """Processes that have `mark` in their environment, with their command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{mark}=1".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def namespaces(pids: list[int] | None = None) -> set[str]:
    """The namespaces that these processes live in; of all processes by default.

    A process without a command line is dead, and waits for init to take note: nothing lives in its namespaces.
    """
    found = set()
    for pid in pids if pids is not None else [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes():
                found |= {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "uts", "mnt", "pid", "user")}
        except OSError:
            continue
    return found


CALLER = "from ch02_hardware_parallelism import virtual_cluster as vc; vc.run(['sleep', '600'], launch='command')"
PARTS = {  # in the order in which they come: how their command lines begin
    "caller": r"\S+ -c from ch02_hardware_parallelism import virtual_cluster",
    "cli": r"\S+ -m ch02_hardware_parallelism.virtual_cluster ",
    "trial": r"unshare .* sh -c mount ",
    "unshare": r"unshare .*virtual_hosts",
    "switch": r"\S+ -c .*virtual_hosts",
    "host": r"\S+ -I -S -c import os, socket",
    "command": r"sleep 600",
}


def part(mark: str, name: str) -> int | None:
    """The process id of a part of the cluster, None while it is not there."""
    return next((pid for pid, line in sorted(living(mark).items()) if re.match(PARTS[name], line)), None)


@pytest.fixture
def started(tmp_path: Path, victim: str) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    command = (
        [sys.executable, "-c", CALLER] if victim == "caller" else [*CLI, "--launch", "command", "--", "sleep", "600"]
    )
    mark = f"VIRTUAL_CLUSTER_TEST_{os.getpid()}_{next(_marks)}"
    env = {**os.environ, mark: "1", "PYTHONPATH": str(ROOT)}
    said = tmp_path / "stderr"
    with said.open("wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, env=env, stderr=file)
    yield child, mark, said
    for pid in living(mark):
        os.kill(pid, signal.SIGKILL)
    child.wait()


@needs_namespaces
@pytest.mark.parametrize(
    ("when", "victim", "by", "code"),
    [
        ("cli", "caller", "KILL", -9),
        ("switch", "caller", "KILL", -9),
        ("command", "caller", "KILL", -9),
        ("cli", "cli", "KILL", -9),
        ("trial", "cli", "KILL", -9),
        ("unshare", "cli", "KILL", -9),
        ("switch", "cli", "KILL", -9),
        ("host", "cli", "KILL", -9),
        ("command", "cli", "KILL", -9),
        ("switch", "cli", "TERM", -15),
        ("command", "cli", "TERM", -15),
        ("switch", "cli", "INT", 130),
        ("command", "cli", "INT", 130),
        ("trial", "trial", "KILL", 2),
        ("unshare", "unshare", "KILL", 137),
        ("command", "unshare", "KILL", 137),
        ("switch", "switch", "KILL", 137),
        ("host", "switch", "KILL", 137),
        ("command", "switch", "KILL", 137),
        ("command", "command", "KILL", 137),
        ("command", "host", "KILL", 137),
    ],
)
def test_nothing_is_left(
    started: tuple[subprocess.Popen[bytes], str, Path], when: str, victim: str, by: str, code: int
) -> None:
    child, mark, stderr = started
    deadline = time.monotonic() + 30
    while part(mark, when) is None:
        assert child.poll() is None, stderr.read_text()
        assert time.monotonic() < deadline
    theirs = namespaces(list(living(mark))) - namespaces([os.getpid()])
    assert theirs or when in ("cli", "trial", "unshare")
    pid = part(mark, victim)
    assert pid is not None
    os.kill(pid, getattr(signal, f"SIG{by}"))
    while child.poll() is None or living(mark) or theirs & namespaces():
        assert time.monotonic() < deadline, f"left: {living(mark)} {theirs & namespaces()}"
        time.sleep(0.01)
    said = stderr.read_text()
    assert child.returncode == code, said
    if code > 0:
        assert {2: "error: ", 130: "interrupted", 137: "killed"}[code] in said
    links = [name for _, name in socket.if_nameindex()]
    assert not [name for name in links if name.startswith(("port", "rack", "spine", "up0", "down0"))]
    assert "host1" not in Path("/etc/hosts").read_text().split()
    assert not Path("/tmp/hosts").exists()

"""What runs inside a virtual cluster: the switch, which is process 1 of it and starts the commands, and a measurement.

    switch                                      its network namespace: a bridge a rack, and one that joins the racks
    ├── host0   eth0 ═ port0 ─ rack0            eth0 and port0 are the two ends of one cable (a veth pair); each shapes
    └── host1   eth0 ═ port1 ─ rack0            what leaves through it (tbf), so that a link carries its rate each way

When the switch ends, the kernel kills all that lives in its process namespace, and the network goes with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

from common.script import UserError, gpu_names

MTU = 9000  # jumbo frames, as in real clusters: fewer packets for two cores to carry
QUEUE = 64 * 2**20  # bytes that may wait at a port: more than TCP lets out of its windows, so that nothing is dropped
GRACE_S = 3  # for the other hosts, when one has failed: they may have something to say about it

# The mount namespace's own /proc, where that is allowed, and $1 as its /etc/hosts, from a tmpfs: no file is left.
MOUNTS = """mount -t proc proc /proc 2>/dev/null
mount -t tmpfs tmpfs /tmp && printf '%s' "$1" >/tmp/hosts && mount --bind /tmp/hosts /etc/hosts && umount /tmp"""
HOLDER = (
    "import os, socket, sys; socket.sethostname(sys.argv[1]); print(os.readlink('/proc/self'), flush=True); "
    "sys.stdin.read()"
)


@dataclass(frozen=True)
class Cluster:
    """What the machine is made to look like. Rates are in bytes per second, each way; a single rack has no uplink."""

    hosts: int = 2
    ranks: int = 1
    racks: int = 1
    rate_bytes_per_s: float = 125e6
    uplink_bytes_per_s: float | None = None

    @property
    def rack_of_host(self) -> list[int]:
        """Hosts are dealt to racks in blocks: 4 hosts in 2 racks are [0, 0, 1, 1]."""
        return [host * self.racks // self.hosts for host in range(self.hosts)]

    def link_bytes_per_s(self, one: int, other: int) -> float:
        """What the path between two hosts can carry."""
        if self.uplink_bytes_per_s is None or self.rack_of_host[one] == self.rack_of_host[other]:
            return self.rate_bytes_per_s
        return min(self.rate_bytes_per_s, self.uplink_bytes_per_s)


def described() -> Cluster | None:
    """The virtual cluster that this process runs in, None outside of one."""
    text = os.environ.get("VIRTUAL_CLUSTER")
    return Cluster(**{key: value for key, value in json.loads(text).items() if key != "rack_of_host"}) if text else None


def nic_bytes() -> tuple[int, int]:
    """Bytes that eth0 of this host has sent and received since it came up: whole frames, of all processes.

    Raises:
        UserError: there is no eth0 here.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            received, sent = int(counters.split()[0]), int(counters.split()[8])
            return sent, received
    raise UserError("there is no interface eth0 here; run this inside the virtual cluster")


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


# ---------------------------------------------------------------- the network


def do(command: Sequence[str], text: str = "") -> None:
    """Run one of the system's tools with `text` as its input.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise UserError(f"{' '.join(command)} failed ({said}); see what this machine lacks for it")


def shape(device: str, bytes_per_s: float) -> str:
    """tc's line for a token bucket: `burst` bytes may leave at once, the rest at the rate.

    The bucket holds one frame and what accrues while the kernel's timer is late: more, and a message of some KiB would
    cost nothing; less, and the link would never reach its rate.
    """
    burst = MTU + 1000 + int(bytes_per_s * 50e-6)
    return f"qdisc add dev {device} root tbf rate {bytes_per_s:.0f}bps burst {burst} limit {QUEUE}"


@dataclass(frozen=True)
class Host:
    """A network and a name of its own, which live as long as `holder` does. /proc, whosever it is, calls that `pid`."""

    name: str
    holder: subprocess.Popen[str]
    pid: str

    @classmethod
    def make(cls, name: str) -> Host:
        command = ["unshare", "--net", "--uts", sys.executable, "-I", "-S", "-c", HOLDER, name]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout
        if not (pid := holder.stdout.readline().strip()):
            raise UserError(f"{name} did not come up; see the lines above")
        return cls(name, holder, pid)

    def runs(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one there."""
        return ["nsenter", "--target", self.pid, "--net", "--uts", "--", *command]


def build(cluster: Cluster) -> list[Host]:
    """Make the hosts, plug them in, shape the links."""
    # Twice: torch looks for the name of an IPv4 peer in its IPv6 form too, and warns when there is none.
    names = "".join(f"{v6}{address(host)} host{host}\n" for v6 in ("", "::ffff:") for host in range(cluster.hosts))
    do(["sh", "-c", MOUNTS, "sh", "127.0.0.1 localhost\n::1 localhost\n" + names])
    hosts = [Host.make(f"host{host}") for host in range(cluster.hosts)]
    bridges = [f"rack{rack}" for rack in range(cluster.racks)] + ["spine"] * (cluster.racks > 1)
    links = [line for name in bridges for line in (f"link add {name} type bridge", f"link set {name} up")]
    queues = []
    if cluster.uplink_bytes_per_s:
        for rack in range(cluster.racks):
            links.append(f"link add up{rack} mtu {MTU} type veth peer name down{rack} mtu {MTU}")
            links += [f"link set up{rack} master rack{rack} up", f"link set down{rack} master spine up"]
            queues += [shape(f"{end}{rack}", cluster.uplink_bytes_per_s) for end in ("up", "down")]
    for host, rack in enumerate(cluster.rack_of_host):
        peer = f"peer name eth0 mtu {MTU} netns /proc/{hosts[host].pid}/ns/net"
        links += [f"link add port{host} mtu {MTU} type veth {peer}", f"link set port{host} master rack{rack} up"]
        queues.append(shape(f"port{host}", cluster.rate_bytes_per_s))
    do(["ip", "-batch", "-"], "\n".join(links))
    do(["tc", "-batch", "-"], "\n".join(queues))
    for number, host in enumerate(hosts):
        own = f"link set lo up\naddress add {address(number)}/24 dev eth0\nlink set eth0 up"
        do(host.runs(["ip", "-batch", "-"]), own)
        do(host.runs(["tc", "-batch", "-"]), shape("eth0", cluster.rate_bytes_per_s))
    return hosts


# ---------------------------------------------------------------- the commands


def gpus_of(host: int, cluster: Cluster) -> dict[str, str]:
    """Each host its own GPUs, if there is one for every rank; else none: two hosts cannot share one in NCCL."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(len(gpu_names()))]
    mine = gpus[host * cluster.ranks : (host + 1) * cluster.ranks] if len(gpus) >= cluster.hosts * cluster.ranks else []
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def commands(
    cluster: Cluster, launch: str, command: list[str], on: int | None
) -> Iterable[tuple[int, list[str], dict]]:
    """What to start: host, command, and the environment that it gets besides ours.

    torchrun numbers the hosts by name, as text: host0 always has rank 0, but host10 comes before host2.
    """
    words = {**asdict(cluster), "rack_of_host": cluster.rack_of_host}
    shared = {f"{library}_SOCKET_IFNAME": "eth0" for library in ("GLOO", "NCCL", "TP")}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "VIRTUAL_CLUSTER": json.dumps(words)}
    for host in range(cluster.hosts) if on is None else [on]:
        env = shared | gpus_of(host, cluster) | {"HOST_INDEX": str(host)}
        if launch == "command":
            yield host, command, env
        elif launch == "torchrun":
            meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29400", "--rdzv-id", "virtual-cluster"]
            size = ["--nnodes", str(cluster.hosts), "--nproc-per-node", str(cluster.ranks)]
            yield host, [sys.executable, "-m", "torch.distributed.run", *size, *meet, *command], env
        else:
            for local in range(cluster.ranks):
                rank = {"RANK": host * cluster.ranks + local, "WORLD_SIZE": cluster.hosts * cluster.ranks}
                rank |= {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": cluster.ranks}
                place = {name: str(value) for name, value in rank.items()}
                yield host, [sys.executable, *command], env | place | {"MASTER_ADDR": "host0", "MASTER_PORT": "29500"}


def say(name: str, line: bytes) -> None:
    """One line on stderr, whole: several threads write there."""
    with _one_at_a_time:
        sys.stderr.buffer.write(f"[{name}] ".encode() + line.rstrip(b"\n") + b"\n")
        sys.stderr.buffer.flush()


_one_at_a_time = threading.Lock()


def pass_on(pipe: IO[bytes], name: str) -> None:
    for line in pipe:
        say(name, line)


def wait(running: dict[int, str], hosts: Sequence[Host]) -> int:
    """Wait for all of the processes (id: name). Returns 0, or the code of the first that failed, 128 + n for signal n.

    As process 1 this one also inherits what others leave behind, and has to wait for it.
    """
    holders = {host.holder.pid: host.name for host in hosts}
    code = 0
    while running:
        pid, status = os.wait()
        ended = os.waitstatus_to_exitcode(status)
        name = running.pop(pid, None) or holders.get(pid)
        if name is None or ended == 0 or code:
            continue
        code = ended if ended > 0 else 128 - ended
        how = f"ended with exit code {ended}" if ended > 0 else f"was killed by signal {-ended}"
        say("cluster", f"{name} {how}".encode() + (b"; the others get a moment to end" if running else b""))
        threading.Thread(target=stop, args=(running, code), daemon=True).start()
    return code


def stop(running: dict[int, str], code: int) -> None:
    """End what is still running: after a while by SIGTERM, then with this process and all in its namespace."""
    time.sleep(GRACE_S)
    for pid in list(running):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    time.sleep(2)
    leave(code)


def leave(code: int) -> NoReturn:
    """Tell the caller that this is the end, and no accident. All that still runs here is killed."""
    os.write(0, b"%d" % code)
    os._exit(code)


def end_with_caller() -> None:
    """The caller holds the other end of our stdin, a socket: it closes when the caller ends, be it by SIGKILL."""
    while os.read(0, 1):
        pass
    os._exit(1)


def switch() -> NoReturn:
    """Build the cluster that the first argument describes, run its command, and exit as the command did."""
    threading.Thread(target=end_with_caller, daemon=True).start()
    plan = json.loads(sys.argv[1])
    cluster = Cluster(**plan["cluster"])
    try:
        hosts = build(cluster)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave(2)
    running, readers, children = {}, [], []
    for host, command, env in commands(cluster, plan["launch"], plan["command"], plan["on"]):
        child = subprocess.Popen(
            hosts[host].runs(command),
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=None if host == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        children.append(child)  # kept: a Popen that is thrown away would wait for its process itself
        running[child.pid] = f"host{host}" + (f" rank {env['RANK']}" if "RANK" in env else "")
        for pipe in (child.stdout, child.stderr):
            if pipe:
                readers.append(threading.Thread(target=pass_on, args=(pipe, f"host{host}"), daemon=True))
                readers[-1].start()
    code = wait(running, hosts)
    for reader in readers:
        reader.join(1)  # something left behind may hold the pipe open
    leave(code)

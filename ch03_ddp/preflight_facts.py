"""What preflight.py looks at on one node: versions, the interface towards the others, limits, room, GPUs."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from ch01_intro.topology import detect
from ch01_intro.topology.detect import source
from ch01_intro.topology.network import ATTENTION, findings
from common import dist, script

# Interfaces that lead to containers and virtual machines of this host, or to nowhere else.
INWARD = re.compile(r"^(lo\d*|docker|veth|virbr|br-|cni|flannel|cali|lxc|podman|kube-ipvs|dummy)")


@dataclass
class Facts:
    """One rank's report. Of a node's ranks only the first fills in what is below `versions`.

    address, interface      where this node's traffic to the other nodes leaves; speed_mbit 0 means that nobody knows
    gloo, nccl              GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; None if not set
    own_name_is             the addresses of this host's own name: without GLOO_SOCKET_IFNAME gloo listens on one
    clock_ms, clock_pm_ms   this clock minus rank 0's, and what the estimate may be off
    """

    host: str
    local_rank: int
    local_world_size: int
    versions: dict[str, str]
    interface: str = ""
    address: str = ""
    mtu: int = 0
    speed_mbit: int = 0
    interfaces: list[str] = field(default_factory=list)
    gloo: str | None = None
    nccl: str | None = None
    own_name_is: list[str] = field(default_factory=list)
    clock_ms: float = 0.0
    clock_pm_ms: float = 0.0
    shm_gib: float = 0.0
    disk_gib: float = 0.0
    open_files: int = 0
    gpus: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)


def here(launch: dist.Launch, folder: Path) -> Facts:
    """This rank's report; `folder` is where the job would write. The interface is filled in by `find_interface`."""
    facts = Facts(socket.gethostname(), launch.local_rank, launch.local_world_size, versions())
    if launch.local_rank:
        return facts
    facts.interfaces = sorted(psutil.net_if_addrs())
    facts.gloo, facts.nccl = os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")
    facts.own_name_is = addresses_of(facts.host)
    shm = Path("/dev/shm")
    facts.shm_gib = shutil.disk_usage(shm).total / 2**30 if shm.is_dir() else 0.0
    facts.disk_gib = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free / 2**30
    facts.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    facts.gpus = script.gpu_names()
    machine = detect(None)
    if machine.gpus or any(nic.rdma for nic in machine.nics):  # chapter 1's findings are about RDMA and GPUs
        found = (finding for finding in findings(machine, source(None).root) if finding.verdict == ATTENTION)
        facts.attention = [f"{f.topic}: {f.found}; {f.consequence}" for f in found]
    return facts


def versions() -> dict[str, str]:
    """What must be the same on all nodes, as name: version."""
    environment = script.environment()
    found = {"python": platform.python_version(), **environment["versions"], "commit": environment["commit"]}
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        nccl = torch.cuda.nccl.version()
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, nccl)), "driver": driver()}
    return {name: str(version) for name, version in found.items()}


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def addresses_of(name: str) -> list[str]:
    """What a name stands for, [] if nobody knows."""
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def find_interface(facts: Facts, towards: str) -> None:
    """Fill in which interface the way to a host leaves through. Sends nothing.

    Raises:
        UserError: there is no way to it.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            facts.address = str(probe.getsockname()[0])
    except OSError as error:
        raise script.UserError(
            f"{facts.host} knows no way to {towards} ({error.strerror}); check its routes and names (ip route get)"
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == facts.address for address in addresses):
            facts.interface = name
    if status := psutil.net_if_stats().get(facts.interface):
        facts.mtu, facts.speed_mbit = status.mtu, status.speed if status.speed < 2**31 else 0

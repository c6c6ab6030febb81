"""A virtual cluster on one machine: hosts in network namespaces, racks of bridges, links of a set rate.

You learn   what a host is to a distributed job (a name, an address, a link), how torchrun's hosts find each other, and
            what a thin link between racks costs
Laptop      python -m ch02_hardware_parallelism.virtual_cluster --hosts 4 --racks 2 --rate 200mbit --uplink-rate 50mbit
Two ranks   python -m ch02_hardware_parallelism.virtual_cluster --rate 100mbit -- ch01_intro/collectives.py
torchrun    python -m ch02_hardware_parallelism.virtual_cluster --launch torchrun -- ch01_intro/collectives.py
By hand     python -m ch02_hardware_parallelism.virtual_cluster --launch command --on 1 -- ping -c 3 host0
GPU node    the same, and each host gets its own GPUs if there is one for every rank; else none is seen inside
You see     the hosts drawn with their links, and what TCP gets out of them: 90 to 99 % of the rate. With a COMMAND,
            that command's output: host0's stdout as it is, the rest on stderr behind the host's name.

Nothing of it is in a file system: when the last process of a namespace ends, however it ends, the kernel takes the
namespace away with all that is in it. virtual_hosts.py is what runs inside.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ch02_hardware_parallelism.virtual_hosts import MOUNTS, Cluster, address, described, nic_bytes
from ch02_hardware_parallelism.virtual_links import MESSAGE
from common import process, script

__all__ = ["Cluster", "address", "check_here", "described", "main", "nic_bytes", "parse_rate", "plan", "run", "why_not"]

INSIDE = "from ch02_hardware_parallelism import virtual_hosts, virtual_links; "
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL")
TRIAL = """ && ip link add rack0 type bridge && ip link add port0 type veth peer name eth0 \
&& tc qdisc add dev port0 root tbf rate 1gbit burst 20kb limit 1mb && unshare --net --uts "$2" -I -S -c pass"""
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "umount", "sh")
RATES = (12_500, 12.5e9)  # bytes per second: 100 kbit to 100 gbit
MAX_HOSTS = 200  # in one /24


def parse_rate(text: str) -> float:
    """Bytes per second of a rate in tc's units (man tc): bit, kbit, mbit, gbit, kibit ..., and bytes as bps, mbps ...

    Raises:
        UserError: not such a rate, or one outside 100kbit to 100gbit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(i?)(bit|bps)?", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise script.UserError(f"the rate {text!r} is not like 100mbit, 1gbit or 12.5mbps; write a number and its unit")
    rate = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")
    rate = rate if match[4] == "bps" else rate / 8
    if not RATES[0] <= rate <= RATES[1]:
        raise script.UserError(f"a rate of {text} cannot be shaped; take one between 100kbit and 100gbit")
    return rate


def environment() -> dict[str, str]:
    """Ours, with this python's programs first on PATH, and those of system administration, which users often lack."""
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    return {**os.environ, "PATH": os.pathsep.join(path)}


def unshare() -> list[str]:
    """The command that gives the next one its namespaces; without root's rights also a user namespace that has them."""
    status = Path("/proc/self/status").read_text()
    capabilities = int(re.search(r"CapEff:\s*(\w+)", status)[1], 16)  # type: ignore[index]
    privileged = capabilities >> 21 & 1 and capabilities >> 12 & 1  # CAP_SYS_ADMIN, CAP_NET_ADMIN
    return [*UNSHARE, *([] if privileged else ["--user", "--map-root-user"])]


def why_not() -> str | None:
    """What this machine lacks for a virtual cluster and what to do, None if it can be made. Tries it: 50 ms."""
    if sys.platform != "linux":
        return "network namespaces are a thing of Linux; run this on Linux, or in a virtual machine that runs it"
    if missing := [tool for tool in TOOLS if not shutil.which(tool, path=environment()["PATH"])]:
        return f"{' and '.join(missing)} not found; install iproute2 and util-linux (make system-deps)"
    trial = [*(command := unshare()), "sh", "-c", MOUNTS + TRIAL, "sh", "", sys.executable]
    tried = subprocess.run(trial, env=environment(), input="", capture_output=True, text=True, timeout=60)
    if tried.returncode == 0:
        return None
    said = ": ".join(tried.stderr.strip().splitlines()[-2:]) or f"exit {tried.returncode}"
    if sys.executable in said:
        return f"this Python cannot be started inside ({said}); take one in a folder that this user may read"
    if "qdisc kind is unknown" in said:
        return f"this kernel cannot shape links ({said}); load it: sudo modprobe sch_tbf"
    if "--user" in command:
        for name, bad, good in (
            ("kernel/unprivileged_userns_clone", "0", "1"),
            ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
            ("user/max_user_namespaces", "0", "10000"),
        ):
            switch = Path("/proc/sys") / name
            if switch.exists() and switch.read_text().strip() == bad:
                setting = f"{name.replace('/', '.')}={good}"
                return f"user namespaces are switched off here ({said}); run it as root, or sudo sysctl -w {setting}"
    return f"no network namespace can be made here ({said}); run it as root, and a container with --privileged"


def run(
    command: Sequence[str],
    *,
    hosts: int = 2,
    ranks: int = 1,
    racks: int = 1,
    rate: str = "1gbit",
    uplink_rate: str | None = None,
    launch: str = "plain",
    timeout_s: float = 300,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> process.Finished:
    """Run `command` in a virtual cluster, as the command line does: stdout is host0's, stderr has everything else.

    Paths start at the repository's root; `rate` and `uplink_rate` are in tc's units, `timeout_s` in seconds.
    A mistake is exit code 2 with its line on stderr; what is not done after `timeout_s` is stopped and `timed_out`.
    """
    sizes = {"--uplink-rate": uplink_rate} if uplink_rate else {}
    sizes |= {"--hosts": hosts, "--ranks": ranks, "--racks": racks, "--rate": rate, "--launch": launch}
    sizes |= {"--timeout-s": timeout_s + 60}  # ours comes first
    flags = [word for name, value in sizes.items() for word in (name, str(value))]
    line = [sys.executable, "-m", "ch02_hardware_parallelism.virtual_cluster", *flags, "--", *command]
    return process.run(line, timeout_s=timeout_s, env=env, on_line=on_line)


def bring_up(
    cluster: Cluster, launch: str, command: Sequence[str], *, on: int | None, timeout_s: float, capture: bool = False
) -> tuple[int, str]:
    """Make the cluster, run the command in it, and take it down. Returns the exit code, and host0's stdout if captured.

    Process 1 inside reads a socket whose other end only this process holds: it ends when we do, in whatever way, and
    the kernel then kills all that it has started. Its last word there is the exit code.
    """
    plan = {"cluster": asdict(cluster), "launch": launch, "command": list(command), "on": on}
    inside = [*unshare(), sys.executable, "-c", INSIDE + "virtual_hosts.switch()", json.dumps(plan)]
    ours, theirs = socket.socketpair()
    try:
        switch = subprocess.Popen(
            inside,
            env=environment(),
            stdin=theirs.fileno(),
            stdout=subprocess.PIPE if capture else None,
            text=True,
            start_new_session=True,  # Ctrl-C reaches us alone
        )
    finally:
        theirs.close()
    try:
        out, _ = switch.communicate(timeout=timeout_s)
        ours.shutdown(socket.SHUT_WR)  # should process 1 have outlived its parent, it ends now
        last_word = ours.recv(16)
    except subprocess.TimeoutExpired:
        print(f"error: not done after {timeout_s:g} s; pass a larger --timeout-s", file=sys.stderr)
        return 124, ""
    finally:
        ours.close()
        switch.wait()
    if not last_word:
        print("error: the cluster was killed from outside; see whether memory ran out, start it again", file=sys.stderr)
        return 137, ""
    return int(last_word), out or ""


def check_command(launch: str, command: Sequence[str]) -> None:
    """Raises UserError if the command cannot be started."""
    if launch == "command":
        if not shutil.which(command[0], path=environment()["PATH"]):
            raise script.UserError(f"there is no command {command[0]}; check its name, or install it")
    elif command[0] == "-m":
        try:
            found = len(command) > 1 and importlib.util.find_spec(command[1])
        except ModuleNotFoundError:
            found = None
        if not found:
            raise script.UserError(f"there is no module {' '.join(command[1:2])}; check its name and where you are")
    elif not command[0].endswith(".py"):
        hint = f"take --launch command for {command[0]!r}"
        raise script.UserError(f"{launch} starts a SCRIPT.py or -m MODULE on each rank; {hint}")
    elif not Path(command[0]).is_file():
        raise script.UserError(f"there is no script {command[0]}; check its path")


def plan(
    *, hosts: int = 2, ranks: int = 1, racks: int = 1, rate: str = "1gbit", uplink_rate: str | None = None
) -> Cluster:
    """The cluster that `run` makes of the same words.

    Raises:
        UserError: a rate is none, or the sizes do not fit each other.
    """
    link = parse_rate(rate)
    if hosts > MAX_HOSTS:
        raise script.UserError(f"{hosts} hosts are too many for one machine; take at most {MAX_HOSTS}")
    if hosts % racks:
        raise script.UserError(f"{hosts} hosts do not fill {racks} racks evenly; take a divisor of --hosts")
    if racks == 1 and uplink_rate:
        raise script.UserError("an uplink joins racks and there is one rack; add --racks 2, or drop --uplink-rate")
    enough = link * hosts // racks if racks > 1 else None  # all of a rack at once: no bottleneck
    return Cluster(hosts, ranks, racks, link, parse_rate(uplink_rate) if uplink_rate else enough)


def check_here(otherwise: str = "") -> None:
    """Raises UserError if no virtual cluster can be made by this process; `otherwise`: what else the user can do."""
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ:  # as common.dist asks, without its torch
        raise script.UserError("a virtual cluster starts its own ranks; start this with plain python")
    if reason := why_not():
        raise script.UserError(reason + otherwise)


def draw(cluster: Cluster) -> str:
    """The hosts, racks and links as a tree in text."""
    by_rack = [[h for h in range(cluster.hosts) if cluster.rack_of_host[h] == r] for r in range(cluster.racks)]
    lines, indent = [], ""
    if cluster.uplink_bytes_per_s:
        lines.append("spine")
    for rack, members in enumerate(by_rack):
        if cluster.uplink_bytes_per_s:
            last = rack == cluster.racks - 1
            lines.append(f"{'└' if last else '├'}── {mbit(cluster.uplink_bytes_per_s)} ── rack{rack}")
            indent = "    " if last else "│   "
        else:
            lines.append("rack0")
        for host in members:
            branch = "└" if host == members[-1] else "├"
            ranks = "1 rank" if cluster.ranks == 1 else f"{cluster.ranks} ranks"
            lines.append(f"{indent}{branch}── {mbit(cluster.rate_bytes_per_s)} ── host{host}  {address(host)}  {ranks}")
    return "\n".join(lines)


def mbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e6:.4g} Mbit/s"


def check(cluster: Cluster, timeout_s: float) -> dict:
    """Bring it up, and hold what TCP gets between host0 and others against their links."""
    print(draw(cluster), flush=True)
    command = [sys.executable, "-c", INSIDE + "virtual_links.measure()"]
    code, out = bring_up(cluster, "command", command, on=None, timeout_s=timeout_s, capture=True)
    if code:
        raise SystemExit(code)
    print(f"\n{'TCP':16}{'link':>14}{'out':>14}{'back':>14}{'64 KiB':>11}{'at the rate':>13}{'RTT':>11}")
    rows = []
    for peer, found in json.loads(out.splitlines()[-1]).items():
        link = cluster.link_bytes_per_s(0, int(peer.removeprefix("host")))
        out_back = found["out_bytes_per_s"], found["back_bytes_per_s"]
        speeds = "".join(f"{mbit(speed):>14}" for speed in (link, *out_back))
        times = f"{found['message_s'] * 1e3:8.2f} ms{MESSAGE / link * 1e3:10.2f} ms{found['rtt_s'] * 1e3:8.2f} ms"
        print(f"{'host0 - ' + peer:16}{speeds}{times}")
        slower = min(out_back)
        row = {"link_mbit": link * 8 / 1e6, "measured_mbit": slower * 8 / 1e6, "rate_ratio": slower / link}
        rows.append(row | {"message_64kib_ms": found["message_s"] * 1e3, "rtt_ms": found["rtt_s"] * 1e3})
    if min(row["rate_ratio"] for row in rows) < 0.9:
        print("The cores, not the link, set the pace here: take a lower --rate.")
    far = {f"far_{name}": value for name, value in rows[-1].items()} if len(rows) > 1 else {}
    sizes = {"hosts": cluster.hosts, "racks": cluster.racks, "rate_mbit": cluster.rate_bytes_per_s * 8 / 1e6}
    return sizes | rows[0] | far


def main(argv: list[str] | None = None) -> dict:
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    command = words[end + 1 :]
    parser = script.parser(__doc__)
    parser.usage = "%(prog)s [flags] [-- COMMAND ...]"
    parser.add_argument("--hosts", type=script.at_least(1), default=2)
    parser.add_argument("--ranks", type=script.at_least(1), default=1, help="ranks a host, for plain and torchrun")
    parser.add_argument("--racks", type=script.at_least(1), default=1)
    parser.add_argument("--rate", default="1gbit", help="of each host's link, each way, in tc's units")
    parser.add_argument("--uplink-rate", help="of each rack's link to the spine (default: all its hosts at once)")
    parser.add_argument(
        "--launch",
        choices=("plain", "torchrun", "command"),
        default="plain",
        help="COMMAND is SCRIPT.py or -m MODULE: plain starts its ranks, torchrun an agent a host; or any command",
    )
    parser.add_argument("--on", type=script.at_least(0), metavar="HOST", help="with --launch command: on one host only")
    parser.add_argument("--timeout-s", type=script.positive, default=600)
    args = parser.parse_args(words[:end])
    cluster = plan(hosts=args.hosts, ranks=args.ranks, racks=args.racks, rate=args.rate, uplink_rate=args.uplink_rate)
    if args.on is not None and (args.launch != "command" or args.on >= args.hosts):
        raise script.UserError(f"--on {args.on} picks one of {args.hosts} hosts for --launch command; correct it")
    if command:
        check_command(args.launch, command)
    elif end < len(words) or args.launch != "plain":
        raise script.UserError("no COMMAND; write it behind --, or drop --launch to check the links")
    elif cluster.hosts < 2:
        raise script.UserError("one host has no link to check; take --hosts 2, or give a COMMAND behind --")
    check_here()
    if command:
        raise SystemExit(bring_up(cluster, args.launch, command, on=args.on, timeout_s=args.timeout_s)[0])
    script.start(__file__, args)
    return check(cluster, args.timeout_s)


if __name__ == "__main__":
    script.run(main)

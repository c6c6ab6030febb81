"""A job on several hosts with nothing but ssh: torchrun on each, all output here, and all stopped together.

You learn   what a launcher does besides starting things: same folder and environment everywhere, one place for the
            output, and an end: a host that fails, Ctrl-C, a limit of time, and a launcher that is itself killed
Laptop      python -m ch03_ddp.ssh_launch --ssh local --hosts one,two --ranks 1 -- ch03_ddp/train_ddp.py --steps 20
            (without ssh: both hosts are this one)
Cluster     python -m ch03_ddp.ssh_launch --hosts node1,node2 --ranks 8 -- ch03_ddp/train_ddp.py --preset small
            Before: keys that let you in without a password, this repository and its .venv at the same path everywhere,
            --port of the first host open to the others. Check first: the same with ch03_ddp/preflight.py.
You see     the first host's stdout as it is, and on stderr everything else behind its host's name. The exit code is
            that of the first host that failed; 124 after --timeout-s

ssh alone does not end what it started: when the connection is lost, the command over there goes on. So what it starts
is this file's `node`, which holds torchrun by a string: when its stdin ends, it stops torchrun and all its ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from common import process, script

SSH = "ssh -T -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15"
PASSED_ON = ("NCCL_", "GLOO_", "TORCH_", "OMP_NUM_THREADS", "HF_")
GRACE_S = 3  # for the other hosts, when one has failed: they may have something to say about it
STOP_S = 40  # torchrun gives its ranks 30 s
NODE = "from ch03_ddp import ssh_launch; ssh_launch.node()"


@dataclass(frozen=True)
class Connection:
    """ssh to one host; closing its stdin stops the job there."""

    host: str
    ssh: subprocess.Popen[bytes]


def node() -> NoReturn:
    """On each host: the first line of stdin says what to start; its end says to stop."""
    words = json.loads(sys.stdin.buffer.readline())
    out, err = (lambda line, pipe=pipe: print(line, file=pipe, flush=True) for pipe in (sys.stdout, sys.stderr))
    with process.Child(words["command"], env=words["env"], on_line=out, on_error=err) as torchrun:
        hung_up = threading.Event()

        def watch() -> None:
            sys.stdin.buffer.read()
            hung_up.set()
            torchrun.stop(STOP_S)

        threading.Thread(target=watch, daemon=True).start()
        code = torchrun.wait(1e9).returncode
    os._exit(1 if hung_up.is_set() else code if code >= 0 else 128 - code)


def torchrun(rank: int, hosts: Sequence[str], args: argparse.Namespace, command: Sequence[str]) -> list[str]:
    """One host's command. The first host is node 0, and the others find it by its name."""
    address = args.master_addr or ("127.0.0.1" if args.ssh == "local" else hosts[0].rpartition("@")[2])
    sizes = [f"--nnodes={len(hosts)}", f"--node-rank={rank}", f"--nproc-per-node={args.ranks}"]
    meet = [f"--master-addr={address}", f"--master-port={args.port}"]
    return [args.python, "-m", "torch.distributed.run", *sizes, *meet, *command]


def connect(rank: int, hosts: Sequence[str], args: argparse.Namespace, command: Sequence[str]) -> Connection:
    """Start ssh, and tell `node` over there what to do: on its stdin, where no shell meddles with it."""
    start = f"cd {shlex.quote(str(process.ROOT))} && exec {shlex.quote(args.python)} -c {shlex.quote(NODE)}"
    env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    if args.ssh == "local":  # the hosts share this one's cores
        env.setdefault("OMP_NUM_THREADS", str(max(1, script.usable_cores() // len(hosts))))
    env |= dict(pair.partition("=")[::2] for pair in args.env)
    ssh = subprocess.Popen(
        ["sh", "-c", start] if args.ssh == "local" else [*shlex.split(args.ssh), hosts[rank], start],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches us alone
    )
    assert ssh.stdin
    with contextlib.suppress(BrokenPipeError):  # then it has ended, and says why on stderr
        ssh.stdin.write(json.dumps({"command": torchrun(rank, hosts, args, command), "env": env}).encode() + b"\n")
        ssh.stdin.flush()
    return Connection(hosts[rank], ssh)


def pass_on(pipe: IO[bytes], host: str | None) -> None:
    """Lines to our stderr behind the host's name, or to our stdout as they are."""
    for line in pipe:
        text = line.decode(errors="replace").rstrip("\n")
        sys.stderr.write(f"[{host}] {text}\n") if host else sys.stdout.write(f"{text}\n")
        (sys.stderr if host else sys.stdout).flush()


def supervise(connections: Sequence[Connection], timeout_s: float) -> int:
    """Until all hosts are done, or one has failed, or time is up. The exit code."""
    ended: queue.Queue[tuple[Connection, int]] = queue.Queue()
    readers = []
    for connection in connections:
        plain = None if connection is connections[0] else connection.host
        for pipe, host in ((connection.ssh.stdout, plain), (connection.ssh.stderr, connection.host)):
            readers.append(threading.Thread(target=pass_on, args=(pipe, host), daemon=True))
        wait = threading.Thread(target=lambda c=connection: ended.put((c, c.ssh.wait())), daemon=True)
        readers.append(wait)
    for reader in readers:
        reader.start()
    deadline, code = time.monotonic() + timeout_s, 0
    try:
        for _ in connections:
            connection, status = ended.get(timeout=max(0.0, deadline - time.monotonic()))
            if status and not code:
                code = status if status > 0 else 128 - status
                why = "ssh itself failed: see its line above" if status == 255 else f"exit code {code}"
                print(f"error: {connection.host} failed ({why}); the others are stopped", file=sys.stderr, flush=True)
                deadline = min(deadline, time.monotonic() + GRACE_S)
    except queue.Empty:
        if not code:
            code = 124
            print(f"error: not done after {timeout_s:g} s; pass a larger --timeout-s", file=sys.stderr, flush=True)
    finally:
        stop(connections)
        for reader in readers:
            reader.join(2)
    return code


def stop(connections: Sequence[Connection]) -> None:
    """Let go of all the strings, and wait until the jobs at their ends have stopped."""
    for connection in connections:
        assert connection.ssh.stdin
        with contextlib.suppress(BrokenPipeError):
            connection.ssh.stdin.close()
    deadline = time.monotonic() + STOP_S + 10
    for connection in connections:
        try:
            connection.ssh.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"error: {connection.host} does not answer; see whether its ranks still run", file=sys.stderr)
            connection.ssh.kill()


def host_list(text: str) -> list[str]:
    """argparse type: host1,user@host2 or @FILE with a host a line (# begins a comment)."""
    if text.startswith("@"):
        try:
            text = re.sub(r"#.*", "", Path(text[1:]).read_text(encoding="utf-8"))
        except OSError as error:
            raise script.UserError(f"cannot read the hosts in {text[1:]} ({error.strerror}); check the path") from None
    hosts = re.split(r"[,\s]+", text.strip(", \n"))
    if wrong := [host for host in hosts if not re.fullmatch(r"([\w.-]+@)?[A-Za-z0-9][\w.:-]*", host)]:
        raise script.UserError(f"{wrong[0]!r} is no host; write host1,user@host2 or @FILE")
    if double := sorted({host for host in hosts if hosts.count(host) > 1}):
        raise script.UserError(f"{double[0]} is in the list twice; raise --ranks for more ranks on a host")
    return hosts


def check(hosts: Sequence[str], args: argparse.Namespace, command: Sequence[str]) -> None:
    """Raises UserError for what can be known to fail before a host is bothered."""
    if not command:
        raise script.UserError("no SCRIPT; write it and its flags behind --")
    if command[0] != "-m" and not (process.ROOT / command[0]).is_file():
        raise script.UserError(f"there is no script {command[0]}; paths start at the repository's root")
    if args.ssh != "local" and not shutil.which(shlex.split(args.ssh)[0]):
        raise script.UserError(f"there is no {shlex.split(args.ssh)[0]} here; install it, or pass --ssh COMMAND")
    if wrong := [pair for pair in args.env if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL)]:
        raise script.UserError(f"--env {wrong[0]!r} is not NAME=VALUE; write it so")
    if len(hosts) > 1 and hosts[0] in ("localhost", "127.0.0.1", "::1") and not args.master_addr:
        raise script.UserError(f"the other hosts cannot find {hosts[0]}; name the first host as they know it")
    if args.ssh == SSH:  # with a command of the user's own, names are its business
        for host in hosts:
            name = host.rpartition("@")[2]
            known = subprocess.run(["ssh", "-G", name], capture_output=True, text=True, timeout=30).stdout
            real = next((line.split()[1] for line in known.splitlines() if line.startswith("hostname ")), name)
            try:
                socket.getaddrinfo(real, 22)
            except OSError as error:
                raise script.UserError(f"unknown host {name} ({error.strerror}); check its name") from None


def main(argv: list[str] | None = None) -> dict:
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    command = words[end + 1 :]
    parser = script.parser(__doc__)
    parser.usage = "%(prog)s --hosts HOSTS [flags] -- SCRIPT.py ... | -m MODULE ..."
    parser.add_argument("--hosts", type=host_list, required=True, help="host1,user@host2,... or @FILE, node 0 first")
    parser.add_argument("--ranks", default="auto", help="a host: a number, or auto: its GPUs, else its cores")
    parser.add_argument("--port", type=script.at_least(1), default=29500, help="on the first host")
    parser.add_argument("--master-addr", help="how the others find the first host (default: as it is in --hosts)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="besides NCCL_*, GLOO_*, ...")
    parser.add_argument("--python", default=sys.executable, help="on the hosts (default: this one's path)")
    parser.add_argument("--ssh", default=SSH, help="COMMAND that runs another one: COMMAND HOST 'SHELL LINE'; or local")
    parser.add_argument("--timeout-s", type=script.positive, default=24 * 3600)
    args = parser.parse_args(words[:end])
    if args.ranks != "auto" and not re.fullmatch(r"[1-9]\d*", args.ranks):
        raise script.UserError(f"--ranks {args.ranks} is neither a number nor auto; write one of them")
    check(args.hosts, args, command)
    connections: list[Connection] = []
    try:
        for rank in range(len(args.hosts)):
            connections.append(connect(rank, args.hosts, args, command))  # noqa: PERF401 - those made are to be stopped
    except BaseException:
        stop(connections)
        raise
    raise SystemExit(supervise(connections, args.timeout_s))


if __name__ == "__main__":
    script.run(main)

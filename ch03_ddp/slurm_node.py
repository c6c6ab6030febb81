"""What runs inside a Slurm cluster of our own: on host0 munged, slurmctld, a slurmd and the command; else a slurmd.

All of it lives in a tmpfs that hides /etc/slurm from the virtual cluster's processes only. The daemons stay in the
foreground; when host0 is done, the others read the end of a FIFO, and with the last of them the kernel takes all away.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from common.script import UserError, usable_cores

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "srun", "sbatch")
HOME = Path("/etc/slurm")
FIFO = HOME / "up"
START_S = 60  # for the daemons; they take two seconds
RUNS_ON = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED", "SIGNALING"}
CONFIG = """\
ClusterName=virtual
SlurmctldHost=host0
SlurmUser={user}
SlurmdUser={user}
# cred_expire is also how long a requeued job has to wait before it may start again
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
ReturnToService=2
KillWait=10
MinJobAge=86400
MessageTimeout=30
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,sched_min_interval=1,bf_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
NodeName=host[0-{last}] CPUs={cores} RealMemory={memory_mib} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def main() -> NoReturn:
    """On every host; the first argument is JSON: nodes, grace_s and the command."""
    words = json.loads(sys.argv[1])
    os.environ["SLURM_CONF"] = str(HOME / "slurm.conf")
    first = os.environ["HOST_INDEX"] == "0"
    if os.geteuid() == 0 and first:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(HOME)], check=True)
    if os.geteuid() == 0:
        become_ourselves()
    try:
        code = head(**words) if first else member()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def become_ourselves() -> None:
    """Go on under our own id where we are root in a user namespace only: Slurm wants a root that may set groups."""
    user, group = (Path(f"/proc/self/{kind}_map").read_text().split() for kind in ("uid", "gid"))
    if (user[0], user[2]) == ("0", "1") and user[1] != "0":  # 0 is the one id that there is; outside it is `user[1]`
        again = [sys.executable, "-c", "from ch03_ddp import slurm_node; slurm_node.main()", sys.argv[1]]
        as_we_are = [f"--map-user={user[1]}", f"--map-group={group[1]}"]
        os.execvp("unshare", ["unshare", "--user", *as_we_are, *again])


def head(nodes: int, grace_s: int, command: Sequence[str]) -> int:
    """Start the cluster, run the command, wait for its jobs. Returns the command's exit code, 1 if a job failed."""
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // nodes
    sizes = {"last": nodes - 1, "cores": usable_cores(), "memory_mib": memory_mib, "grace_s": grace_s}
    sizes["user"] = pwd.getpwuid(os.geteuid()).pw_name
    (HOME / "slurm.conf").write_text(CONFIG.format(home=HOME, **sizes))
    (HOME / "munge.key").touch(mode=0o600)
    (HOME / "munge.key").write_bytes(secrets.token_bytes(128))
    files = [f"--{name}-file={HOME}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [Daemon.start("munged", "--foreground", "--force", f"--socket={HOME}/munge.socket", *files)]
    until(lambda: (HOME / "munge.socket").exists(), daemons)
    daemons.append(Daemon.start("slurmctld", "-D"))
    os.mkfifo(FIFO)
    os.open(FIFO, os.O_RDWR)  # ours alone, until we end: see `member`
    daemons.append(Daemon.start("slurmd", "-D"))
    until(lambda: said("sinfo", "-h", "-N", "-p", "batch", "-o", "%T").split().count("idle") == nodes, daemons)
    if not command:
        print(said("sinfo", "-N", "-p", "batch", "-o", "%N %T %c cores %m MiB"), end="", flush=True)
        return 0
    code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    states = follow_jobs(daemons)
    return code or int(any(state != "COMPLETED" for state in states))


def member() -> int:
    """A slurmd, until host0 ends: then its FIFO has no writer any more, and reading it is over."""
    until(FIFO.exists, [])
    with FIFO.open("rb") as fifo:
        slurmd = Daemon.start("slurmd", "-D")
        fifo.read()
    slurmd.process.terminate()
    slurmd.process.wait()
    return 0


@dataclass(frozen=True)
class Daemon:
    """A server in the foreground; what it says is in `log`."""

    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, *command: str) -> Daemon:
        log = HOME / f"{command[0]}.{os.environ['HOST_INDEX']}.said"
        with log.open("wb") as out:
            started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        return cls(log, started)

    def check(self) -> None:
        """Raises UserError if it has ended."""
        if self.process.poll() is not None:
            lines = self.log.read_text(errors="replace").splitlines() or ["it said nothing"]
            why = " / ".join([line for line in lines if "error" in line.lower()][-3:] or lines[-3:])
            raise UserError(f"{self.log.name.split('.')[0]} ended ({why}); see whether its version and rights fit")


def until(condition: Callable[[], object], daemons: Sequence[Daemon]) -> None:
    """Wait for the condition.

    Raises:
        UserError: a daemon ended, or START_S went by.
    """
    deadline = time.monotonic() + START_S
    while not condition():
        for daemon in daemons:
            daemon.check()
        if time.monotonic() > deadline:
            raise UserError(f"Slurm was not ready in {START_S} s; see whether the machine is overloaded")
        time.sleep(0.05)


def said(*command: str) -> str:
    """stdout of one of Slurm's tools, "" while the controller does not answer."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def follow_jobs(daemons: Sequence[Daemon]) -> list[str]:
    """Show the output of all jobs as it comes, and each change of state, until all have ended. Returns their states."""
    seen: dict[str, Job] = {}
    shown: dict[Path, int] = {}
    while True:
        answer = said("scontrol", "show", "jobs", "-o")  # "" if there is none; "No jobs in the system" is one
        jobs = [Job.parse(line) for line in answer.splitlines() if line.startswith("JobId=")]
        for job in jobs:  # the state was read before the output: of a job that has ended, all is there
            if job.output.is_file():
                with job.output.open("rb") as file:
                    file.seek(shown.get(job.output, 0))
                    sys.stdout.buffer.write(file.read())
                    sys.stdout.buffer.flush()
                    shown[job.output] = file.tell()
            if seen.get(job.id) != job:
                why = f" ({job.reason})" if job.reason != "None" else ""
                line = f"job {job.id} {job.name}: {job.state}{why}, restarts {job.restarts}"
                print(line, file=sys.stderr, flush=True)
                seen[job.id] = job
        if answer and not any(job.state in RUNS_ON for job in jobs):
            repeat_result(shown)
            return [job.state for job in jobs]
        for daemon in daemons:
            daemon.check()
        time.sleep(0.2)


def repeat_result(outputs: Iterable[Path]) -> None:
    """RESULT is the last line, also where torchrun had the last word in a job's log: the node that leaves last may find
    the meeting point gone, which costs nothing but a traceback."""
    lines = [line for path in outputs for line in path.read_text(errors="replace").splitlines()]
    results = [line for line in lines if line.startswith("RESULT ")]
    if results and lines[-1] != results[-1]:
        print(results[-1], flush=True)


@dataclass(frozen=True)
class Job:
    """One job as scontrol shows it."""

    id: str
    name: str
    state: str
    reason: str
    restarts: int
    output: Path

    @classmethod
    def parse(cls, line: str) -> Job:
        """One line of `scontrol show jobs -o`. Values may hold blanks: they end before the next name."""
        words = dict(re.findall(r"(?:^|\s)([\w/:]+)=(.*?)(?=\s+[\w/:]+=|\s*$)", line))
        values = (words[name] for name in ("JobId", "JobName", "JobState", "Reason"))
        return cls(*values, int(words.get("Restarts", 0)), Path(words.get("StdOut", os.devnull)))

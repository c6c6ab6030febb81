"""Is a multi-node DeepSpeed job right? Hostfile, config, flags and launcher, before a process is started anywhere.

You learn   what the deepspeed launcher takes from a hostfile and what it passes over in silence: no hostfile is a job
            on this host alone, slots=2x are 2, and a mistake in the config is told by each rank once it has started
Laptop      python ch05_deepspeed_megatron/check_launch.py --hostfile ch05_deepspeed_megatron/launch/hostfile \
                -- ch05_deepspeed_megatron/train_deepspeed.py
GPU node    the same, with the job's own hostfile and flags
Cluster     launch/deepspeed.sh asks it first
You see     hosts and ranks; or one line that says what is wrong, and exit code 2
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ch05_deepspeed_megatron import options
from common import process, script

TRAINING = "ch05_deepspeed_megatron/train_deepspeed.py"


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the file's order: ranks are numbered by it, and the first host is the one that all must find.

    Raises:
        UserError: it cannot be read, is empty, or a line is not HOST slots=N with N > 0.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise script.UserError(
            f"cannot read the hostfile {path} ({reason}); check the path: without it deepspeed stays on this host"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where, host, told = f"{path}:{number}", words[0], dict(word.partition("=")[::2] for word in words[1:])
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", host):
            raise script.UserError(f"{where}: {host!r} is no host; write HOST slots=N")
        if unknown := [word for word in words[1:] if not word.startswith("slots=")]:
            raise script.UserError(f"{where}: {unknown[0]!r} is not known; a line is HOST slots=N")
        if len(words) != 2:
            raise script.UserError(f"{where}: {host} has {len(words) - 1} counts of slots; write HOST slots=N")
        if not re.fullmatch(r"[1-9]\d*", told["slots"]):
            raise script.UserError(f"{where}: slots={told['slots']} is no number above 0; write as many as it has GPUs")
        if host in slots:
            raise script.UserError(f"{where}: {host} is there twice; add its slots up in one line")
        slots[host] = int(told["slots"])
    if not slots:
        raise script.UserError(f"{path} names no host; write a line HOST slots=N for each")
    return slots


@contextmanager
def as_rank_0(slots: dict[str, int]) -> Iterator[None]:
    """What a rank of that job would read in its environment."""
    had = dict(os.environ)
    first = next(iter(slots.items()))
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(sum(slots.values())), "LOCAL_WORLD_SIZE": str(first[1]),
        "MASTER_ADDR": first[0], "MASTER_PORT": "29500",
    }  # fmt: skip
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(had)


def check_launcher(slots: dict[str, int], no_ssh: bool) -> None:
    """
    Raises:
        UserError: what starts ranks on the other hosts is not here, or they could not find the first one.
    """
    if len(slots) > 1 and next(iter(slots)) in ("localhost", "127.0.0.1"):
        raise script.UserError("the other hosts cannot find localhost; name the first host as they know it")
    if len(slots) > 1 and not no_ssh:
        for name, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
            if not shutil.which(name):
                raise script.UserError(
                    f"the deepspeed launcher needs {name}, which is not here; install {package} (make system-deps), or "
                    "start it on each host with --no_ssh"
                )


def main(argv: list[str] | None = None) -> dict:
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    command = words[end + 1 :]
    parser = script.parser(__doc__)
    parser.usage = "%(prog)s --hostfile FILE [--no-ssh] -- SCRIPT.py FLAGS"
    parser.add_argument("--hostfile", type=Path, required=True, help="a line HOST slots=N for each host")
    parser.add_argument("--no-ssh", action="store_true", help="somebody starts deepspeed --no_ssh on each host")
    args = parser.parse_args(words[:end])
    if not command:
        raise script.UserError("no SCRIPT; write it and its flags behind --")
    if not (process.ROOT / command[0]).is_file():
        raise script.UserError(f"there is no script {command[0]}; paths start at the repository's root")
    slots = read_hostfile(args.hostfile)
    check_launcher(slots, args.no_ssh)
    result: dict = {"hosts": len(slots), "ranks": sum(slots.values()), "first_host": next(iter(slots))}
    if (process.ROOT / command[0]).resolve() == process.ROOT / TRAINING:
        with as_rank_0(slots):
            training = options.parse(None, command[1:])
            settings = options.settings(training)
        result |= {
            "stage": settings.get("zero_optimization", {}).get("stage", 0),
            "global_batch": training.global_batch,
            "micro_batches": training.global_batch // (sum(slots.values()) * training.batch_size),
        }
    return result


if __name__ == "__main__":
    script.run(main)

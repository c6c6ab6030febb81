"""One script at several link rates: the virtual cluster is brought up anew for each."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from ch02_hardware_parallelism import virtual_cluster
from common import dist, script


def add_rates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rates", type=script.comma_list(rate), help="of virtual links: 100mbit,1gbit,5gbit")


def rate(text: str) -> str:
    """argparse type: a rate in tc's units."""
    virtual_cluster.parse_rate(text)
    return text


def check_ranks(rates: Sequence[str] | None, hosts: int = 2) -> None:
    """Before anything is made: with --rates there must be a virtual cluster, without it a job of several ranks.

    Raises:
        UserError: there is not.
    """
    if rates:
        virtual_cluster.plan(hosts=hosts)
        virtual_cluster.check_here("; or leave out --rates, under torchrun")
    elif dist.read_launch().world_size < 2:
        raise script.UserError("one rank sends nothing; start it with torchrun, or pass --rates 100mbit,1gbit")


def as_flags(args: argparse.Namespace, *names: str) -> list[str]:
    """The command line that gives another run of the script these values."""
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def at_rates(
    file: str,
    flags: Sequence[str],
    rates: Sequence[str],
    run: script.Run,
    *,
    hosts: int = 2,
    ranks: int = 1,
    timeout_s: float = 600,
) -> dict[str, dict]:
    """The RESULT of the script `file` with `flags` by rate, on virtual hosts of so many ranks. Its output is shown.

    Raises:
        UserError: a run failed.
    """
    found = {}
    for rate in rates:
        print(f"--- links of {rate}", flush=True)
        command = [file, *flags, "--run-dir", str(run.path(rate))]
        done = virtual_cluster.run(
            command, hosts=hosts, ranks=ranks, rate=rate, timeout_s=timeout_s, on_line=_print_unless_result
        )
        if done.returncode or done.result is None:
            said = re.findall(r"error(?: \[rank \d+\])?: (.*)", done.stderr)  # behind a host's name
            why = said[0] if said else f"{done.reason(timeout_s)}; see what it says above"
            raise script.UserError(f"the job at {rate} failed: {why}")
        found[rate] = done.result
    return found


def _print_unless_result(line: str) -> None:
    if not line.startswith("RESULT "):
        print(line, flush=True)

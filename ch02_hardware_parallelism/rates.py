"""One script at several link rates: the virtual cluster is brought up anew for each."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from ch02_hardware_parallelism import virtual_cluster
from common import dist, script


def add_rates(parser: argparse.ArgumentParser) -> None:
    """The flag --rates, refused where one of them is none: before anything has been made."""
    parser.add_argument("--rates", type=rate_list, help="run on virtual links of these rates: 100mbit,1gbit,5gbit")


def rate_list(text: str) -> list[str]:
    """argparse type: rates between commas, in tc's units."""
    rates = text.split(",")
    for rate in rates:
        try:
            virtual_cluster.parse_rate(rate)
        except script.UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return rates


def refuse_one_rank(ctx: dist.Context) -> None:
    """Raises UserError in a job of one rank: there is no communication to measure."""
    if ctx.world_size < 2:
        raise script.UserError("one rank sends nothing; start it with torchrun, or pass --rates 100mbit,1gbit")


def as_flags(args: argparse.Namespace, *names: str) -> list[str]:
    """The command line that gives another run of the script these values."""
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def at_rates(
    file: str, flags: Sequence[str], rates: Sequence[str], run: script.Run, *, hosts: int = 2, timeout_s: float = 600
) -> dict[str, dict]:
    """The RESULT of the script `file` with `flags` by rate, on `hosts` virtual hosts of one rank. Its output is shown.

    Raises:
        UserError: no virtual cluster can be made here, a rate is none, this is a rank of a job, or a run failed.
    """
    if dist.read_launch().launcher != "python":
        raise script.UserError("--rates starts its own ranks; start it with plain python")
    if reason := virtual_cluster.why_not():
        raise script.UserError(f"--rates needs a virtual cluster: {reason}; or leave it out, under torchrun")
    for rate in rates:
        virtual_cluster.parse_rate(rate)
    found = {}
    for rate in rates:
        print(f"--- links of {rate}", flush=True)
        command = [file, *flags, "--run-dir", str(run.path(rate))]
        done = virtual_cluster.run(command, hosts=hosts, rate=rate, timeout_s=timeout_s, on_line=_print_unless_result)
        if done.returncode or done.result is None:
            said = re.findall(r"error(?: \[rank \d+\])?: (.*)", done.stderr)  # behind a host's name
            why = said[0] if said else f"{done.reason(timeout_s)}; see what it says above"
            raise script.UserError(f"the job at {rate} failed: {why}")
        found[rate] = done.result
    return found


def _print_unless_result(line: str) -> None:
    if not line.startswith("RESULT "):
        print(line, flush=True)

"""Which cluster a command means, and whether it can be used: shared by all tools of this chapter.

The first of these that is there: --kubeconfig and --context; the environment's KUBECONFIG; the cluster that a pod runs
in; the one that `python -m ch08_kubernetes.cluster up` started in this checkout. Never ~/.kube/config unasked.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster.rest import as_user_error, get
from common.process import ROOT
from common.script import UserError

FOLDER = ROOT / "runs" / "ch08_kubernetes" / "cluster"  # of `up`
LOOPBACK = ("127.", "localhost", "[::1]")


@dataclass(frozen=True)
class Target:
    """A cluster that answers.

    Attributes:
        origin: where it was found, in words.
        kubeconfig: None inside a pod.
        ours: `up` started it, and it goes when that ends.
    """

    api: client.ApiClient
    url: str
    version: str
    origin: str
    kubeconfig: Path | None
    context: str | None = None
    ours: bool = False


@dataclass(frozen=True)
class State:
    """What a running `up` wrote down. provider: local or kind."""

    pid: int
    created: float  # the process's own time: another one may get its pid
    provider: str
    kubeconfig: str = ""  # empty until it is ready

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def state(folder: Path = FOLDER) -> State | None:
    """Of an `up`, which may be dead by now; None if there is none."""
    try:
        return State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which cluster (else KUBECONFIG, this pod's, or the one that `up` started)")
    group.add_argument("--kubeconfig", type=Path, help="file with address and credentials")
    group.add_argument("--context", help="one of its contexts, if not the current one")


def pointed_at(args: argparse.Namespace) -> bool:
    """Whether the reader names a cluster, by flag or by environment."""
    return bool(args.kubeconfig or args.context or os.environ.get("KUBECONFIG"))


def connect(args: argparse.Namespace, folder: Path = FOLDER) -> Target:
    """Find the cluster that is meant and ask it for its version.

    Raises:
        UserError: there is none, its kubeconfig cannot be read, it does not answer, or it refuses the credentials.
    """
    running = state(folder)
    if pointed_at(args):
        path = args.kubeconfig or os.environ.get("KUBECONFIG") or config.KUBE_CONFIG_DEFAULT_LOCATION
        origin = "--kubeconfig" if args.kubeconfig else "KUBECONFIG" if os.environ.get("KUBECONFIG") else "--context"
        return checked(_settings(str(path), args.context), origin, Path(path), args.context)
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        settings = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException as error:
            raise UserError(f"this pod has no credentials ({error}); give it a service account") from None
        return checked(settings, "this pod's cluster", None)
    if running and running.alive():
        if not running.kubeconfig:
            raise UserError("`up` is still starting its cluster; wait until it says that it is ready")
        path = Path(running.kubeconfig)
        found = checked(_settings(str(path), None), f"{running.provider}, started by `up`", path)
        return replace(found, ours=True)
    raise UserError("no cluster; start one with python -m ch08_kubernetes.cluster up, or pass --kubeconfig")


def checked(settings: client.Configuration, origin: str, kubeconfig: Path | None, context: str | None = None) -> Target:
    """Raises UserError if it does not answer, or not to these credentials."""
    if settings.host.split("//")[-1].startswith(LOOPBACK):
        settings.proxy = None
    settings.retries = urllib3.Retry(3, connect=0)  # a server that is not there is not asked again
    api = client.ApiClient(settings)
    try:
        version = get(api, "/version")["gitVersion"]
        get(api, "/api")  # the version is told to strangers too
    except (ApiException, HTTPError) as error:
        raise as_user_error(error, settings.host) from None
    return Target(api, settings.host, str(version), origin, kubeconfig, context)


def _settings(kubeconfig: str, context: str | None) -> client.Configuration:
    settings = client.Configuration()
    if not any(Path(part).expanduser().is_file() for part in kubeconfig.split(os.pathsep)):
        raise UserError(f"there is no kubeconfig {kubeconfig}; name the file that your cluster's provider gave you")
    try:
        config.load_kube_config(kubeconfig, context=context, client_configuration=settings)
    except Exception as error:  # the library raises what its parser met: YAML, base64, missing files, unknown contexts
        said = " ".join(str(error).split())[:200]
        raise UserError(f"kubeconfig {kubeconfig} cannot be used ({said}); see kubectl config get-contexts") from None
    return settings

"""A real Kubernetes control plane on this machine: no container engine, no root, gone when the block is left.

with LocalCluster(folder) as cluster:
    cluster.kubectl("get", "namespaces")

etcd, kube-apiserver, kube-controller-manager and kube-scheduler run from `make setup-kube`. They are what decides in a
cluster of any size: what is accepted, where pods go, how many there are. What no process here does is run containers:
nodes.py adds nodes that exist in the API alone, and kubelet.py says of their pods what a kubelet would say.

All that listens is the API server's port on 127.0.0.1, for holders of a token; etcd is on a Unix socket in the folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster import build
from ch08_kubernetes.cluster.keys import HOST, self_signed
from ch08_kubernetes.cluster.rest import call
from common import process
from common.ranks import free_port
from common.script import UserError

ADMIN, READER = "admin", "reader"
# The API server writes its own address into the Endpoints of the service `kubernetes`, and takes no loopback there.
ADVERTISED = "192.0.2.1"  # of RFC 5737: for documentation, nobody's
# Alpha in v1.20, and on in every cluster today.
GATES = "TTLAfterFinished=true,GenericEphemeralVolume=true,HPAContainerMetrics=true"
# For nodes without a kubelet: the controller manager does not take them for dead. (40 s is usual.)
PATIENT = {"node-monitor-grace-period": "30m", "node-startup-grace-period": "30m"}
SAID = re.compile(r"^[EF]\d{4} .*?\] (.*)|^Error: (.*)|^error: (.*)")  # klog's errors, cobra's


class LocalCluster:
    """The control plane, in a folder of its own that is made on entering and removed on leaving.

    Args:
        folder: where keys, logs, state and kubeconfigs lie. It must not exist, or be empty.
        port: of the API server; any free one if None.
        apiserver_options, controller_manager_options, scheduler_options: further flags, without the dashes in front:
            {"horizontal-pod-autoscaler-sync-period": "2s"}. They win over the ones here.
        timeout_s: until when it must be ready.

    Attributes:
        kubeconfig: of the user `admin`, who may do everything.
        url: of the API server.

    Raises:
        UserError: on entering: not built, the port is taken, or a server's own words on why it does not start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        apiserver_options: Mapping[str, Any] | None = None,
        controller_manager_options: Mapping[str, Any] | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        timeout_s: float = 120,
    ) -> None:
        self.folder = folder.absolute()
        self.port = port or free_port()
        self.url = f"https://{HOST}:{self.port}"
        self.kubeconfig = self.folder / f"{ADMIN}.kubeconfig"
        self.timeout_s = timeout_s
        self.options: dict[str, Mapping[str, Any]] = {
            "kube-apiserver": apiserver_options or {},
            "kube-controller-manager": controller_manager_options or {},
            "kube-scheduler": scheduler_options or {},
        }
        self._tokens = {user: secrets.token_hex(16) for user in (ADMIN, READER)}
        self._stack = contextlib.ExitStack()
        self._children: dict[str, process.Child] = {}

    def __enter__(self) -> LocalCluster:
        programs = {name: build.binary(name) for name in ("etcd", *self.options)}
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty; name a new folder")
        check_port(self.port)
        deadline = time.monotonic() + self.timeout_s
        with self._stack:  # whatever fails below undoes what was done
            self._stack.callback(remove, self.folder)
            self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            self.folder.chmod(0o700)
            # One pair for all: of the API server, of its proxy to other API servers, and for signing tokens.
            self_signed(self.folder)
            self._write_tokens()
            self.kubeconfig_of(ADMIN)
            for name, options in self._flags().items():
                words = [f"--{flag}={value}" for flag, value in options.items()]
                self._children[name] = self._stack.enter_context(Server([str(programs[name]), *words], cwd=self.folder))
                if name == "kube-apiserver":
                    self._wait(deadline, self._ready, "the API server is not ready")
            self._wait(deadline, self._has_accounts, "the controller manager makes no service accounts")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def client(self, user: str = ADMIN) -> client.ApiClient:
        """A client of the Python library, with a connection pool of its own."""
        return client_of(self.kubeconfig_of(user))

    def kubeconfig_of(self, user: str) -> Path:
        """Write a kubeconfig: `admin` may do everything, `reader` is known and has no rights.

        Any other name gets a token that the server does not know: to it, one that has expired.
        """
        path = self.folder / f"{user}.kubeconfig"
        token = self._tokens.get(user, "0" * 32)
        cluster = {"server": self.url, "certificate-authority": str(self.folder / "tls.crt")}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "local", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": user}}],
            "current-context": "local",
        }
        if not path.exists():  # once: the servers read the admin's while they start
            path.touch(mode=0o600)
            path.write_text(json.dumps(content, indent=2), encoding="utf-8")  # JSON is YAML
        return path

    def kubectl(self, *words: str, user: str = ADMIN, timeout_s: float = 60) -> process.Finished:
        """Run kubectl, the one on PATH or else the one that was built, to its end.

        Raises:
            UserError: there is none.
        """
        program = shutil.which("kubectl") or str(build.binary("kubectl"))
        own = [f"--kubeconfig={self.kubeconfig_of(user)}", f"--cache-dir={self.folder / 'kubectl'}"]
        return process.run([program, *words, *own], timeout_s=timeout_s)

    def dead(self) -> str:
        """What one of the servers said at its end; "" while all run."""
        for name, child in self._children.items():
            if child.process.poll() is not None:
                child.wait(0)  # its last words
                return f"{name} has ended: {why(child.err)}"
        return ""

    def _write_tokens(self) -> None:
        tokens = self.folder / "tokens.csv"
        tokens.touch(mode=0o600)
        groups = {ADMIN: ',"system:masters"'}
        tokens.write_text("".join(f"{t},{user},{user}{groups.get(user, '')}\n" for user, t in self._tokens.items()))

    def _flags(self) -> dict[str, dict[str, Any]]:
        """Each server's flags, in the order in which they start. Paths are relative: each starts in the folder."""
        reach = {"kubeconfig": self.kubeconfig.name, "leader-elect": "false", "port": 0, "secure-port": 0}
        reach |= {"kube-api-qps": 200, "kube-api-burst": 400, "feature-gates": GATES}
        etcd = "unix://etcd:0"  # the socket `etcd:0` in the folder
        return {
            "etcd": {
                "data-dir": "data",
                "listen-client-urls": etcd,
                "advertise-client-urls": etcd,
                "listen-peer-urls": "unix://peer:0",
                "logger": "zap",
            },
            "kube-apiserver": {
                "etcd-servers": etcd,
                "bind-address": HOST,
                "secure-port": self.port,
                "advertise-address": ADVERTISED,
                "tls-cert-file": "tls.crt",
                "tls-private-key-file": "tls.key",
                "token-auth-file": "tokens.csv",
                "authorization-mode": "RBAC",
                "allow-privileged": "true",
                "service-cluster-ip-range": "10.96.0.0/16",
                "service-account-issuer": "https://kubernetes.default.svc",
                "service-account-signing-key-file": "tls.key",
                "service-account-key-file": "tls.key",
                # Aggregation: what the server says of itself and of the user when it asks another API server.
                "proxy-client-cert-file": "tls.crt",
                "proxy-client-key-file": "tls.key",
                "requestheader-client-ca-file": "tls.crt",
                "requestheader-username-headers": "X-Remote-User",
                "requestheader-group-headers": "X-Remote-Group",
                "requestheader-extra-headers-prefix": "X-Remote-Extra-",
                "feature-gates": GATES,
                **self.options["kube-apiserver"],
            },
            "kube-controller-manager": {
                **reach,
                "service-account-private-key-file": "tls.key",  # it makes the accounts' tokens, as in real clusters
                "root-ca-file": "tls.crt",
                **self.options["kube-controller-manager"],
            },
            "kube-scheduler": {**reach, **self.options["kube-scheduler"]},
        }

    def _wait(self, deadline: float, there: Callable[[], bool], what: str) -> None:
        while not there():
            if dead := self.dead():
                raise UserError(f"{dead}; see whether its options are right")
            if time.monotonic() > deadline:
                raise UserError(f"{what} after {self.timeout_s:g} s; see whether the machine is busy, or wait longer")
            time.sleep(0.05)

    def _ready(self) -> bool:
        return self._answers("/readyz")

    def _has_accounts(self) -> bool:
        return self._answers("/api/v1/namespaces/default/serviceaccounts/default")

    def _answers(self, path: str) -> bool:
        with client_of(self.kubeconfig, retries=False) as api:
            try:
                call(api, "GET", path)
            except (ApiException, HTTPError):
                return False
        return True


class Server(process.Child):
    """A server of the control plane. It is killed, not asked to stop: nothing that it could save is kept."""

    def __exit__(self, *_: object) -> None:
        self.stop(grace_s=0)


def client_of(kubeconfig: Path, retries: bool | None = None) -> client.ApiClient:
    """A client for a server on this machine: past any proxy that the environment names."""
    settings = client.Configuration()
    settings.retries = retries
    config.load_kube_config(str(kubeconfig), client_configuration=settings)
    settings.proxy = None
    return client.ApiClient(settings)


def check_port(port: int) -> None:
    """Raises UserError if something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "ports end at 65535"
            raise UserError(f"port {port} cannot be taken ({reason}); free it, or take another --port") from None


def why(printed: list[str]) -> str:
    """A server's own error, of all that it printed."""
    found = [next(filter(None, match.groups())) for line in printed if (match := SAID.match(line))]
    return (found or [line.strip() for line in printed if line.strip()] or ["it said nothing"])[-1][:300]


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)

"""A server of custom.metrics.k8s.io and external.metrics.k8s.io: what prometheus-adapter and KEDA are to the HPA.

with MetricsServer(of_pods=..., external=...) as server:
    server.register(api)       # from now on the API server passes such requests on to it (aggregation)

The HPA asks for one metric of all pods under a selector; the answer is a list of values, with the pods they are of.
Source: Kubernetes documentation, Aggregation layer; k8s.io/metrics, pkg/apis/custom_metrics/v1beta2, external_metrics.
"""

from __future__ import annotations

import json
import re
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from kubernetes.client import ApiClient

from ch08_kubernetes.cluster.apply import apply, delete
from ch08_kubernetes.cluster.keys import HOST, self_signed
from ch08_kubernetes.cluster.rest import Json, get
from common.script import UserError

CUSTOM = [f"custom.metrics.k8s.io/{version}" for version in ("v1beta1", "v1beta2")]
EXTERNAL = ["external.metrics.k8s.io/v1beta1"]
Pods = Callable[[str, str, str], Mapping[str, float]]  # (namespace, metric, label selector) -> values by pod
External = Callable[[str, str], float]  # (namespace, metric) -> value


class MetricsServer:
    """HTTPS on a free port of the loopback address.

    Args:
        of_pods: a custom metric of pods; raises KeyError if there is no such metric.
        external: one of no object of the cluster; the same.
    """

    def __init__(self, of_pods: Pods | None = None, external: External | None = None) -> None:
        self.of_pods, self.external = of_pods, external
        self._registered: list[Json] = []
        self._api: ApiClient | None = None

    def __enter__(self) -> MetricsServer:
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, body = answer(self.path)
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as folder:
            context.load_cert_chain(*self_signed(Path(folder)))
        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        # In the connection's own thread: a client that connects and says nothing holds nobody up.
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._api:
                delete(self._api, self._registered)  # one that does not answer holds up the deletion of namespaces
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def register(self, api: ApiClient, namespace: str, timeout_s: float = 60) -> None:
        """Make the API server pass requests on: an APIService, and a Service that leads to this machine.

        Raises:
            UserError: it does not do so in time; with its own reason.
        """
        service = {"name": "metrics-of-ours", "namespace": namespace}
        self._registered = [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": service,
                "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": self.port}]},
            }
        ]
        for served in [CUSTOM[0], *(EXTERNAL if self.external else [])]:
            group, version = served.split("/")
            self._registered.append({
                "apiVersion": "apiregistration.k8s.io/v1",
                "kind": "APIService",
                "metadata": {"name": f"{version}.{group}"},
                "spec": {
                    "group": group, "version": version, "groupPriorityMinimum": 100, "versionPriority": 100,
                    "service": service | {"port": self.port},
                    "insecureSkipTLSVerify": True,  # on this machine; a cluster's has a caBundle
                },
            })  # fmt: skip
        self._api = api
        apply(api, self._registered)
        deadline = time.monotonic() + timeout_s
        for wanted in self._registered[1:]:
            path = f"/apis/apiregistration.k8s.io/v1/apiservices/{wanted['metadata']['name']}"
            while (said := available(get(api, path))) is not None:
                if time.monotonic() > deadline:
                    raise UserError(f"the API server passes nothing on to {path} ({said}); see kubectl get apiservice")
                time.sleep(0.1)

    def answer(self, path: str) -> tuple[int, Json]:
        """Status and body for a GET."""
        url = urlsplit(path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        served = "/".join(parts[1:3])
        try:
            if parts == ["apis"]:
                return 200, _groups([*CUSTOM, *EXTERNAL])
            if parts[0] == "apis" and served in CUSTOM + EXTERNAL:
                if len(parts) == 3:
                    return 200, _resources(served)
                of_pods = parts[3] == "namespaces" and parts[5:7] == ["pods", "*"] and len(parts) == 8
                if served in CUSTOM and of_pods and self.of_pods:
                    found = self.of_pods(parts[4], parts[7], query.get("labelSelector", ""))
                    return 200, _custom(served, parts[4], parts[7], found)
                if served in EXTERNAL and parts[3] == "namespaces" and len(parts) == 6 and self.external:
                    return 200, _external(parts[5], self.external(parts[4], parts[5]))
        except (KeyError, IndexError):
            pass
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        return 404, status | {"message": f"no such metric: {url.path}"}


def available(service: Json) -> str | None:
    """None if it is; else why not."""
    conditions = service.get("status", {}).get("conditions", [])
    found = next((c for c in conditions if c["type"] == "Available"), {"message": "not looked at yet"})
    return None if found.get("status") == "True" else str(found.get("message"))


def quantity(value: float) -> str:
    """As the HPA counts: in thousandths."""
    return f"{round(value * 1000)}m"


def quantity_value(text: str) -> float:
    """Of a Kubernetes quantity without a binary suffix: "2500m" is 2.5.

    Raises:
        ValueError: it is none.
    """
    if not (match := re.fullmatch(r"(-?\d+(?:\.\d+)?)([mk]?)", text)):
        raise ValueError(f"{text!r} is no quantity")
    return float(match[1]) * {"": 1, "m": 1e-3, "k": 1e3}[match[2]]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _groups(served: list[str]) -> Json:
    groups = []
    for name in sorted({version.split("/")[0] for version in served}):
        versions = [{"groupVersion": v, "version": v.split("/")[1]} for v in served if v.startswith(name)]
        groups.append({"name": name, "versions": versions, "preferredVersion": versions[0]})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def _resources(served: str) -> Json:
    """What a client reads first. Metrics are not listed one by one: the HPA does not look there."""
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": served, "resources": []}


def _custom(served: str, namespace: str, metric: str, values: Mapping[str, float]) -> Json:
    named: Json = {"metricName": metric} if served.endswith("v1beta1") else {"metric": {"name": metric}}
    items = [
        {
            "describedObject": {"kind": "Pod", "namespace": namespace, "name": pod, "apiVersion": "/v1"},
            "timestamp": _now(), "value": quantity(value), **named,
        }
        for pod, value in values.items()
    ]  # fmt: skip
    return {"kind": "MetricValueList", "apiVersion": served, "metadata": {}, "items": items}


def _external(metric: str, value: float) -> Json:
    item = {"metricName": metric, "metricLabels": {}, "timestamp": _now(), "value": quantity(value)}
    return {"kind": "ExternalMetricValueList", "apiVersion": EXTERNAL[0], "metadata": {}, "items": [item]}

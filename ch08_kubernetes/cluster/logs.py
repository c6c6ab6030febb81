"""What fake containers have printed: the one port of a kubelet that the API server itself asks, for `kubectl logs`.

GET /containerLogs/NAMESPACE/POD/CONTAINER?tailLines=N answers with the pod's annotation `book/logs`. With --follow the
answer ends where the text ends. (Path and query: kubernetes/kubernetes, pkg/kubelet/server.)
"""

from __future__ import annotations

import ssl
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster.fates import LOGS, annotations
from ch08_kubernetes.cluster.keys import HOST, self_signed
from ch08_kubernetes.cluster.rest import find


class LogServer:
    """Listens on a free port of the loopback address until the block is left.

    Attributes:
        port: known on entering.
    """

    def __init__(self, api: ApiClient) -> None:
        self.api, self.port = api, 0

    def __enter__(self) -> LogServer:
        with tempfile.TemporaryDirectory() as folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self_signed(Path(folder)))
        self._server = ThreadingHTTPServer((HOST, 0), _handler(self.api))
        self._server.daemon_threads = True
        # In the connection's own thread: a client that connects and says nothing holds nobody up.
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(api: ApiClient) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            parts, query = asked.path.strip("/").split("/"), parse_qs(asked.query)
            status, text = 404, "not found\n"
            if len(parts) == 4 and parts[0] == "containerLogs":
                try:
                    pod = find(api, f"/api/v1/namespaces/{parts[1]}/pods/{parts[2]}")
                except (ApiException, HTTPError):
                    pod = None
                if pod:
                    status, text = 200, annotations(pod).get(LOGS, f"{parts[3]}: no container runs here\n")
            lines = text.splitlines(keepends=True)
            if tail := query.get("tailLines"):
                lines = lines[-int(tail[0]) :] if int(tail[0]) else []
            body = "".join(lines).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler

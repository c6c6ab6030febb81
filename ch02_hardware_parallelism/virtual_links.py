"""What TCP gets out of the links of a virtual cluster, measured from inside: virtual_cluster.py without a COMMAND."""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import time

from ch02_hardware_parallelism.virtual_hosts import address, described

MESSAGE = 2**16  # bytes of the message that is timed by itself


def exchange_s(sock: socket.socket, send: int, receive: int, *, idle_s: float = 0) -> float:
    """Seconds to send so many bytes and to receive so many for an answer, after the link has been idle."""
    time.sleep(idle_s)
    message = struct.pack("!QQ", send, receive) + bytes(send)
    begin = time.perf_counter()
    sock.sendall(message)
    sock.recv(receive, socket.MSG_WAITALL)
    return time.perf_counter() - begin


def serve(sock: socket.socket) -> None:
    """Answer exchanges until the other side hangs up."""
    while header := sock.recv(16, socket.MSG_WAITALL):
        send, receive = struct.unpack("!QQ", header)
        sock.recv(send, socket.MSG_WAITALL)
        sock.sendall(bytes(receive))


def connect(host: str, port: int) -> socket.socket:
    """Try until the other host listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def measure() -> None:
    """On every host. host0 measures the paths to its neighbour and to the last host, and prints them as JSON."""
    cluster, me = described(), int(os.environ["HOST_INDEX"])
    assert cluster
    peers = sorted({1, cluster.hosts - 1})
    if me in peers:
        with socket.create_server((address(me), 5201)) as listener:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            serve(sock)
    if me:
        return
    found = {}
    for peer in peers:
        size = int(min(max(cluster.link_bytes_per_s(0, peer) * 0.4, 2**18), 2**26))
        with connect(f"host{peer}", 5201) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            exchange_s(sock, size // 4, size // 4)  # TCP's windows open
            found[f"host{peer}"] = {
                "rtt_s": statistics.median(exchange_s(sock, 1, 1) for _ in range(30)),
                "message_s": statistics.median(exchange_s(sock, MESSAGE, 1, idle_s=0.02) for _ in range(9)),
                "out_bytes_per_s": size / exchange_s(sock, size, 1),
                "back_bytes_per_s": size / exchange_s(sock, 1, size),
            }
    print(json.dumps(found))

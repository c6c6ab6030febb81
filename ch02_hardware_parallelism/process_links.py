"""What one process can hand to another on the same host: through memory that both map, and through loopback TCP.

The far end is a python of its own, which imports this module and no torch. Each message is timed from the first byte
that the sender touches to the answer that the receiver has all of it in a buffer of its own.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from common.process import ROOT
from common.script import UserError

FAR_END = "import sys; from ch02_hardware_parallelism.process_links import far_end; far_end(*map(int, sys.argv[1:]))"
SHARED, TCP = b"s", b"t"


@contextlib.contextmanager
def shared_memory(size: int) -> Iterator[int]:
    """A file descriptor of `size` bytes of memory that has no name, so that nothing is left behind."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("link")
        try:
            os.ftruncate(descriptor, size)
            yield descriptor
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            yield file.fileno()


def measure(size: int, repeats: int, wrong: list[str], timeout_s: float = 60) -> dict[str, list[float]]:
    """GB/s of each of `repeats` messages of `size` bytes: {"shared memory": [...], "loopback TCP": [...]}.

    The names of those that arrived as something else are added to `wrong`.

    Raises:
        UserError: the second process did not come up, or went away.
    """
    rates: dict[str, list[float]] = {"shared memory": [], "loopback TCP": []}
    with socket.create_server(("127.0.0.1", 0)) as listener, shared_memory(size) as descriptor:
        listener.settimeout(timeout_s)
        command = [sys.executable, "-c", FAR_END, str(listener.getsockname()[1]), str(descriptor), str(size)]
        child = subprocess.Popen(command, pass_fds=[descriptor], cwd=ROOT)
        try:
            peer, _ = listener.accept()
            peer.settimeout(timeout_s)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with peer, mmap.mmap(descriptor, size) as mapped:
                there = np.frombuffer(mapped, dtype=np.uint8)
                message = np.empty(size, dtype=np.uint8)
                for number in range(repeats + 1):
                    message[:] = number + 1
                    for name, word in (("shared memory", SHARED), ("loopback TCP", TCP)):
                        begin = time.perf_counter()
                        if word == SHARED:
                            np.copyto(there, message)
                        peer.sendall(word)
                        if word == TCP:
                            peer.sendall(message)
                        answer = peer.recv(1)
                        seconds = time.perf_counter() - begin
                        if not answer:
                            raise ConnectionResetError("it went away")
                        if answer[0] != (number + 1) % 256:
                            wrong.append(name)
                        if number:  # the first warms up
                            rates[name].append(size / seconds / 1e9)
                del there  # the mapping cannot be closed while it is in use
        except OSError as error:
            raise UserError(f"the second process did not answer ({error}); see its own error above") from None
        finally:
            child.kill()
            child.wait()
    return rates


def far_end(port: int, descriptor: int, size: int) -> None:
    """The receiver: copy each message into an own buffer, then answer with its last byte."""
    own = np.zeros(size, dtype=np.uint8)
    with socket.create_connection(("127.0.0.1", port)) as sock, mmap.mmap(descriptor, size) as mapped:
        there = np.frombuffer(mapped, dtype=np.uint8)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while word := sock.recv(1):
            if word == SHARED:
                np.copyto(own, there)
            else:
                received = 0
                while received < size:
                    got = sock.recv_into(memoryview(own)[received:])
                    if not got:
                        return
                    received += got
            sock.sendall(own[-1:].tobytes())
        del there

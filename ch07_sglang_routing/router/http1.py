"""As much of HTTP/1.1 (RFC 9112) as a router needs: where a message begins and ends, and which fields go no further.

Two parties that disagree on where a request ends let a client smuggle a second one past the first. So a head is taken
only as the grammar has it, a length only if there is one; all else is refused. A request goes on to a worker with its
body whole and a length of our own making; an answer's bytes are passed on as they come, only counted.
"""

from __future__ import annotations

import json
import re

MAX_HEAD = 32 * 1024  # bytes of a request line and its header fields
REASONS = {
    200: "OK", 202: "Accepted", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 413: "Content Too Large", 431: "Request Header Fields Too Large", 501: "Not Implemented",
    502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip
KINDS = {400: "invalid_request_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
         502: "bad_gateway", 503: "service_unavailable", 504: "timeout_error"}  # fmt: skip

# No bare CR or LF, no blank before a colon, no folded line, no control character: each has smuggled something.
_FIELDS = rb"((?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*)*)"
_REQUEST = re.compile(rb"([A-Z]{1,20}) (/[\x21-\x7e]*) HTTP/1\.([01])" + _FIELDS)
_ANSWER = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?" + _FIELDS)
# What concerns one connection only (RFC 9110, section 7.6.1). The length is written anew.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
     b"trailer", b"upgrade", b"expect", b"transfer-encoding", b"content-length")
)  # fmt: skip
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")


class BadMessage(Exception):
    """What came is not HTTP as we take it. `status` is the answer to a client; the text says why."""

    def __init__(self, status: int, why: str, more: bytes = b"") -> None:
        super().__init__(why)
        self.status, self.more = status, more  # more: fields of the answer


class Head:
    """The head of a request or an answer.

    fields: lower-case names -> values; of those that came twice the last, of Connection all. own: the raw
    fields that go on to the next connection. length: bytes of the body; None: until the connection is closed. chunked:
    framed by chunks instead.
    """

    __slots__ = ("chunked", "close", "fields", "length", "method", "own", "status", "target")

    method: bytes
    target: bytes
    status: int

    def __init__(self, raw: bytes, minor: bytes) -> None:
        self.fields: dict[bytes, bytes] = {}
        self.length: int | None = None
        self.chunked = False
        own = [b""]
        for line in raw[2:].split(b"\r\n") if raw else ():
            name, _, value = line.partition(b":")
            name = name.lower()
            if name in self.fields and name in (b"content-length", b"transfer-encoding", b"host"):
                raise BadMessage(400, f"two {name.decode()} fields")
            value = value.strip(b" \t")
            if name == b"connection" and name in self.fields:
                value = self.fields[name] + b"," + value
            self.fields[name] = value
            if name not in _HOP_BY_HOP:
                own.append(line)
        if (encoding := self.fields.get(b"transfer-encoding")) is not None:
            if b"content-length" in self.fields:
                raise BadMessage(400, "both Content-Length and Transfer-Encoding")
            if encoding.lower() != b"chunked" or minor == b"0":
                raise BadMessage(501, "a transfer coding other than chunked")
            self.chunked = True
        elif (length := self.fields.get(b"content-length")) is not None:
            if not length.isdigit() or len(length) > 18:
                raise BadMessage(400, "a Content-Length that is no length")
            self.length = int(length)
        connection = self.fields.get(b"connection", b"").lower()
        self.close = minor == b"0" or connection == b"close"
        if connection not in (b"", b"close", b"keep-alive"):  # it may name more fields that stop here
            options = [option.strip() for option in connection.split(b",")]
            self.close |= b"close" in options
            named = tuple(option + b":" for option in options)
            own = [line for line in own if not line.lower().startswith(named)]
        self.own = b"\r\n".join(own)


def request_head(data: bytes) -> Head:
    """A request's head, without the empty line that ends it. Raises BadMessage."""
    if (found := _REQUEST.fullmatch(data)) is None:
        raise BadMessage(400, "the request's head is not HTTP/1.1")
    method, target, minor, raw = found.groups()
    if minor == b"0":
        raise BadMessage(505, "HTTP/1.0 is not spoken here; use HTTP/1.1")
    head = Head(raw, minor)
    if b"host" not in head.fields:
        raise BadMessage(400, "no Host field")
    head.method, head.target = method, target
    if head.length is None:
        head.length = 0
    return head


def answer_head(data: bytes, method: bytes) -> Head:
    """The head of an answer to a request of this method. Raises BadMessage."""
    if (found := _ANSWER.fullmatch(data)) is None:
        raise BadMessage(502, "the worker's answer is not HTTP/1.1")
    minor, status, raw = found.groups()
    head = Head(raw, minor)
    head.status = int(status)
    if method == b"HEAD" or head.status in (204, 304) or head.status < 200:
        head.length, head.chunked = 0, False
    elif head.length is None and not head.chunked:
        head.close = True
    return head


def request_bytes(head: Head, body: bytes) -> bytes:
    """A request as it is sent to a worker."""
    start = b"%s %s HTTP/1.1%s\r\n" % (head.method, head.target, head.own)
    if body or head.method not in (b"GET", b"HEAD"):
        start += b"content-length: %d\r\n" % len(body)
    return start + b"\r\n" + body


class Chunked:
    """Follows a chunked body as its bytes come. `body`, if kept, collects what is in the chunks.

    done: the last byte was seen. between: no chunk is half sent now.
    """

    def __init__(self, keep: bool = False) -> None:
        self.body = bytearray()
        self.done = False
        self._keep = keep
        self._left = 0  # bytes of the chunk that are still to come
        self._expects = "size"
        self._line = b""

    @property
    def between(self) -> bool:
        return self._expects == "size" and not self._line

    def feed(self, data: bytes) -> int:
        """Where the body ends in `data`, or its length. Raises BadMessage."""
        at = 0
        while at < len(data) and not self.done:
            if self._left:
                step = min(self._left, len(data) - at)
                if self._keep:
                    self.body += data[at : at + step]
                self._left -= step
                at += step
                continue
            end = data.find(b"\n", at) + 1 or len(data)
            line = self._line + data[at:end]
            at = end
            if len(line) > 4096:
                raise BadMessage(400, "a line between chunks is too long")
            if not line.endswith(b"\n"):
                self._line = line
                break
            self._line = b""
            self._next(line)
        return at

    def _next(self, line: bytes) -> None:
        if self._expects == "size":
            if (size := _CHUNK_SIZE.fullmatch(line)) is None:
                raise BadMessage(400, "a chunk's size is no number")
            self._left = int(size[1], 16)
            self._expects = "end" if self._left else "trailer"
        elif self._expects == "end":
            if line != b"\r\n":
                raise BadMessage(400, "a chunk is longer than it says")
            self._expects = "size"
        elif line == b"\r\n":  # trailers before it are let go
            self.done = True


def answer_bytes(
    status: int, body: bytes, *, method: bytes = b"", close: bool = False, kind: bytes = b"application/json",
    more: bytes = b"",
) -> bytes:  # fmt: skip
    """An answer of our own, to a request of this method; more: fields of it, each with its line's end."""
    connection = b"connection: close\r\n" if close else b""
    return b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n%s%s\r\n%s" % (
        status, REASONS[status].encode(), kind, len(body), connection, more, b"" if method == b"HEAD" else body,
    )  # fmt: skip


def error_body(status: int, message: str) -> bytes:
    """An error in OpenAI's shape, so that their clients show its text."""
    error = {"message": message, "type": KINDS.get(status, "invalid_request_error"), "param": None, "code": status}
    return json.dumps({"error": error}).encode()

"""Server-sent events, parsed as the bytes arrive (WHATWG HTML, 9.2.6 "Interpreting an event stream")."""

from __future__ import annotations

import re
from dataclasses import dataclass

LINE_END = re.compile(rb"\r\n|\n|\r")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Event:
    """`data` is the event's data lines joined by newlines; `name` is "message" unless an event line names another."""

    data: str
    name: str = "message"


class Parser:
    """Give it bytes cut anywhere (in a line end, in a UTF-8 character); it returns the events that are now complete.

    Comments (lines that begin with a colon, sent to keep a connection open) and the fields `id` and `retry`, which are
    about reconnecting, are skipped. An event counts only once its blank line has come: what a broken connection leaves
    of one is never returned.
    """

    def __init__(self) -> None:
        self._rest = b""  # of a line whose end has not come
        self._after_cr = False  # a line ended in \r: a \n that comes next belongs to that end
        self._first = True
        self._data: list[str] = []
        self._name = ""

    def feed(self, chunk: bytes) -> list[Event]:
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        *lines, self._rest = LINE_END.split(self._rest + chunk)
        return [event for line in lines if (event := self._line(line))]

    def _line(self, line: bytes) -> Event | None:
        if self._first:
            line, self._first = line.removeprefix(BOM), False
        if not line:
            return self._dispatch()
        field, _, value = line.decode("utf-8", errors="replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        return None

    def _dispatch(self) -> Event | None:
        event = Event("\n".join(self._data), self._name or "message") if self._data else None
        self._data, self._name = [], ""
        return event

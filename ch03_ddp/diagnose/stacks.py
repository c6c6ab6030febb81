"""Where a process is right now, asked by another thread of it: the line of the user's code, or all stacks in full.

From outside, without a word in the program: `py-spy dump --pid PID` (add --native for NCCL's and gloo's frames).
"""

from __future__ import annotations

import faulthandler
import linecache
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch

from common import dist

TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__).parent)
COMMON = str(Path(dist.__file__).parent)
PYTHON = str(Path(threading.__file__).parent)


def users_own(filename: str) -> bool:
    """Neither torch, nor the standard library, nor what this book wraps around them."""
    inside = filename.startswith((TORCH, HERE, COMMON, "<")) or (
        filename.startswith(PYTHON) and "-packages" not in filename
    )
    return not inside


def short(filename: str) -> str:
    return Path(filename).name


def main_thread() -> str:
    """The user's line that the main thread is in: `train.py:88: time.sleep(60)`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)  # innermost first
    own = next((line for line in stack if users_own(line.filename)), stack[0] if stack else None)
    if own is None or own.lineno is None:
        return "an unknown line"
    return f"{short(own.filename)}:{own.lineno}: {linecache.getline(own.filename, own.lineno).strip()}"


def caller() -> str:
    """The innermost line of the user's own code on this thread, as file:line."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not users_own(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{short(frame.f_code.co_filename)}:{frame.f_lineno}"


def raised_at(error: BaseException) -> str:
    """The innermost line of the user's own code that the exception went through, as file:line."""
    lines = [line for line in traceback.extract_tb(error.__traceback__) if users_own(line.filename)]
    return f"{short(lines[-1].filename)}:{lines[-1].lineno}" if lines else "an unknown line"


def everything() -> str:
    """The stacks of all threads. faulthandler takes no lock and allocates nothing: it works in a stuck process too."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()

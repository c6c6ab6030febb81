"""torch.distributed's functions, replaced while a block is watched, to do something before each call and to time it.

What is called as `torch.distributed.all_reduce(...)` is seen, under whatever name the module was imported; what was
imported as a bare function before (`from torch.distributed import all_reduce`), and what C++ calls, is not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as td

# name -> the argument that holds the message this rank puts in
COLLECTIVES: dict[str, str] = {
    "all_reduce": "tensor", "broadcast": "tensor", "reduce": "tensor", "all_gather": "tensor",
    "all_gather_into_tensor": "input_tensor", "gather": "tensor", "scatter": "tensor", "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input", "all_to_all": "input_tensor_list", "all_to_all_single": "input", "barrier": "",
}  # fmt: skip
Before = Callable[[str, torch.Tensor | None, td.ProcessGroup], None]


@contextmanager
def interposed(before: Before | None, mark: Callable[[], Any], waited: Callable[[Any, Any], None]) -> Iterator[None]:
    """Replace the functions for the length of the block.

    Args:
        before: called with the function's name, its message and its group; it may raise.
        mark: gives a point in time (or in a CUDA stream).
        waited: is given the marks before and after each call and each wait.
    """

    def around(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = mark()
            if before:
                given = bound(original, args, kwargs)
                group = given.get("group") or td.group.WORLD
                if isinstance(group, td.ProcessGroup):  # else this rank does not belong to it, and torch does nothing
                    before(described(name, given), message(name, given), group)
            result = original(*args, **kwargs)
            waited(begin, mark())
            return result

        return call

    def wait(work: td.Work, *args: Any) -> bool:
        """Of what was started with async_op=True."""
        begin = mark()
        done = original_wait(work, *args)
        waited(begin, mark())
        return done

    originals = {name: getattr(td, name) for name in COLLECTIVES}
    original_wait = td.Work.wait
    try:
        td.Work.wait = wait
        for name, original in originals.items():
            setattr(td, name, around(name, original))
        yield
    finally:
        td.Work.wait = original_wait
        for name, original in originals.items():
            setattr(td, name, original)


signature_of = functools.cache(inspect.signature)


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, however they were passed; {} if they do not fit, which the call itself will say."""
    try:
        return dict(signature_of(function).bind(*args, **kwargs).arguments)
    except TypeError:
        return {}


def described(name: str, given: dict[str, Any]) -> str:
    """The function with what else must be alike on all ranks: all_reduce(MAX), broadcast(src=1)."""
    words = [f"{key}={given[key]}" for key in ("src", "dst", "group_src", "group_dst") if given.get(key) is not None]
    op = given.get("op", td.ReduceOp.SUM)
    if op != td.ReduceOp.SUM:
        words.append(str(op).rsplit(".", 1)[-1])
    return f"{name}({', '.join(words)})" if words else name


def message(name: str, given: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that this rank puts in; of a list its first."""
    found = given.get(COLLECTIVES[name])
    return found[0] if isinstance(found, list | tuple) and found else found

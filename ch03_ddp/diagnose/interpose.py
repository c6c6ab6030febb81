"""torch.distributed's functions, replaced while a block is watched, to do something before each call and to time it.

What is called as `torch.distributed.all_reduce(...)` is seen, under whatever name the module was imported; what was
imported as a bare function before (`from torch.distributed import all_reduce`), and what C++ calls, is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as td

# name -> which argument is the message that this rank puts in
COLLECTIVES: dict[str, int | None] = {
    "all_reduce": 0, "broadcast": 0, "reduce": 0, "all_gather": 1, "all_gather_into_tensor": 1, "gather": 0,
    "scatter": 0, "reduce_scatter": 0, "reduce_scatter_tensor": 1, "all_to_all": 1, "all_to_all_single": 1,
    "barrier": None,
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

    def around(name: str, original: Callable[..., Any], position: int | None) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = mark()
            if before:
                before(described(name, kwargs), message(args, kwargs, position), kwargs.get("group") or td.group.WORLD)
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
        for name, position in COLLECTIVES.items():
            setattr(td, name, around(name, originals[name], position))
        yield
    finally:
        td.Work.wait = original_wait
        for name, original in originals.items():
            setattr(td, name, original)


def described(name: str, kwargs: dict[str, Any]) -> str:
    """The function with what else must be alike on all ranks: all_reduce(MAX), broadcast(src=1)."""
    given = [f"{key}={kwargs[key]}" for key in ("src", "dst") if kwargs.get(key) is not None]
    op = kwargs.get("op", td.ReduceOp.SUM)
    if op != td.ReduceOp.SUM:
        given.append(str(op).rsplit(".", 1)[-1])
    return f"{name}({', '.join(given)})" if given else name


def message(args: tuple[Any, ...], kwargs: dict[str, Any], position: int | None) -> torch.Tensor | None:
    """The tensor that this rank puts in; of a list its first."""
    if position is None:
        return None
    names = ("tensor", "input_tensor", "input", "input_list", "input_tensor_list")
    found = args[position] if len(args) > position else next((kwargs[n] for n in names if n in kwargs), None)
    return found[0] if isinstance(found, list | tuple) and found else found

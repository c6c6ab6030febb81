"""What torch's Flight Recorder holds: every collective of this rank, DDP's own included, with the line that called it.

Since torch 2.13 it also records gloo, and it is on unless TORCH_FR_BUFFER_SIZE (entries, default 2000) is 0. Python
cannot see the collectives that DDP's reducer starts from C++; the recorder does.
"""

from __future__ import annotations

import math
import pickle
import time
from dataclasses import dataclass
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as td

from ch03_ddp.diagnose.stacks import short, users_own

KEPT = 100  # of each group, in a report
SAME_SIZE = ("all_reduce", "broadcast", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor",
             "_all_gather_base", "_reduce_scatter_base")  # fmt: skip
DTYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
          "Int": "int32", "Byte": "uint8", "Char": "int8", "Bool": "bool"}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One collective as one rank called it."""

    group: str  # torch's name of the process group: "0" is the whole job's
    number: int  # 1 for the first of its group; the n-th of one rank meets the n-th of another
    op: str  # all_reduce
    dtype: str  # float32
    shape: tuple[int, ...]
    where: str  # train.py:88
    done: bool = True
    age_s: float = 0.0  # since it was called

    @property
    def signature(self) -> tuple[object, ...]:
        """What all ranks must agree on. A root may hold more than the others: sizes are compared where they must match.

        A tensor [2, 2] and a tensor [4] are the same message.
        """
        same_size = self.op.split("(")[0] in SAME_SIZE
        return (self.op, self.dtype, math.prod(self.shape)) if same_size else (self.op,)

    @property
    def what(self) -> str:
        return f"{self.op} #{self.number} ({self.dtype} {list(self.shape)}, {self.where})"

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Call:
        return Call(**{**value, "shape": tuple(value["shape"])})

    @property
    def tensor(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def calls(since_ns: int = 0) -> list[Call]:
    """This rank's collectives since that time, oldest first: the last KEPT of each group, without sends and receives.

    The recorder outlives a process group, and the next one numbers its calls from 1 again.
    """
    entries: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):  # two recorders: gloo's, and NCCL's where torch has it
        if dump := getattr(c10d, name, None):
            entries += pickle.loads(dump()).get("entries", [])
    by_group: dict[str, list[Call]] = {}
    for entry in entries:
        if not entry["is_p2p"] and entry["time_created_ns"] >= since_ns:
            call = _call(entry)
            by_group.setdefault(call.group, []).append(call)
    return [call for each in by_group.values() for call in sorted(each, key=lambda c: c.number)[-KEPT:]]


def _call(entry: dict[str, Any]) -> Call:
    sizes, dtypes = entry["input_sizes"], entry["input_dtypes"]
    return Call(
        group=entry["process_group"][0],
        number=entry["collective_seq_id"],
        op=entry["profiling_name"].split(":")[-1],
        dtype=DTYPES.get(dtypes[0], dtypes[0]) if dtypes else "nothing",
        shape=tuple(sizes[0]) if sizes else (),
        where=line_of(entry["frames"]),
        done=entry["retired"] or entry["state"] == "completed",
        age_s=time.time() - entry["time_created_ns"] / 1e9,
    )


def line_of(frames: list[dict[str, Any]]) -> str:
    """The innermost line of the user's own code, as file:line."""
    own = (frame for frame in frames if users_own(frame["filename"]))
    frame = next(own, frames[0] if frames else None)
    return f"{short(frame['filename'])}:{frame['line']}" if frame else "unknown line"


def groups() -> dict[str, list[int]]:
    """The process groups that this rank belongs to: torch's name -> global ranks."""
    names = td.distributed_c10d._world.pg_names
    return {name: td.get_process_group_ranks(group) for group, name in names.items()}

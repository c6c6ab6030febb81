"""From what a DeepSpeed job shows to its cause and its cure, each in one line. debug_deepspeed.py causes what it names.

verdict = of_config(settings, ranks)                              # before anything starts
with part("gradients"): ...                                       # an allocation failed: of what?
FirstNotFinite(model); of_numbers(...)                            # a loss scale that is too high, or a real NaN
of_offload(...)                                                   # the disk, or how it is used?
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ch05_deepspeed_megatron import ds_check
from common.script import UserError

GIB = 2**30
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "not enough memory")


@dataclass(frozen=True)
class Verdict:
    """cause: a word or a key of the config. stage: of ZeRO, if that is the cure."""

    cause: str
    text: str
    cure: str
    stage: int | None = None

    def __str__(self) -> str:
        return f"{self.text}; {self.cure}"


# ---------------------------------------------------------------- the config


def of_config(settings: Mapping[str, Any], ranks: int) -> Verdict | None:
    """Its first mistake, by the key that is to be changed."""
    try:
        ds_check.check(settings, ranks)
    except UserError as error:
        text, _, cure = str(error).partition("; ")
        return Verdict(named_in(text, keys_of(settings)), text, cure)
    return None


def named_in(text: str, keys: Iterable[str]) -> str:
    """The key that a line names first, by its dotted name or the last part of it; "" if none."""
    at = {}
    for key in keys:
        for name in (key, key.rpartition(".")[2]):
            if found := re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text):
                at[key] = (found.start(), -len(name))
                break
    return min(at, key=at.__getitem__, default="")


def keys_of(settings: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Dotted names of sections and of what is in them."""
    for key, value in settings.items():
        yield where + key
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{where}{key}.")


# ---------------------------------------------------------------- memory


class NoRoom(Exception):
    """An allocation failed: of which part of a training step."""

    def __init__(self, part: str, asked: str) -> None:
        super().__init__(part, asked)  # both, so that it can be pickled
        self.part, self.asked = part, asked


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """What is allocated in this block is this part of the memory.

    Raises:
        NoRoom: there was none.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY) and not isinstance(error, MemoryError):
            raise
        found = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error))
        raise NoRoom(name, found[1] if found else "more") from None


def state_bytes(parameters: int, stage: int, ranks: int) -> dict[str, int]:
    """What a rank holds of a float32 model's states at the worst of a step, by part; activations come on top.

    From stage 1 on the optimizer has its own copy of the weights. Gradients are flattened in every stage, to be summed
    (stage 0) or stepped on: 8 bytes instead of the paper's 4. Before they are summed, stage 1 holds all of them.
    """
    share = ranks if stage else 1
    return {
        "parameters": 4 * parameters // (ranks if stage == 3 else 1),
        "gradients": max(8 * parameters // share, 4 * parameters * (stage == 1)),
        "optimizer": (12 if stage else 8) * parameters // share,
    }


def of_memory(lost: NoRoom, parameters: int, stage: int, ranks: int, cap_bytes: int, other_bytes: int) -> Verdict:
    """Which part did not fit, and which stage would.

    Args:
        other_bytes: what comes on top of the states: activations, buffers.
    """
    held = state_bytes(parameters, stage, ranks)
    text = (
        f"out of memory in stage {stage} under {cap_bytes / GIB:.2f} GiB: the {lost.part} did not fit ({lost.asked} "
        f"more were asked for; states by stage {stage}: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items()) + " GiB)"
    )  # fmt: skip
    if lost.part == "activations":
        return Verdict("activations", text, "no stage shards them: a smaller micro-batch, or activation checkpointing")
    for higher in range(stage + 1, 4):
        need = sum(state_bytes(parameters, higher, ranks).values()) + other_bytes
        if need <= cap_bytes:
            return Verdict(lost.part, text, f"stage {higher} would fit: {need / GIB:.2f} GiB", higher)
    spared = state_bytes(parameters, 3, ranks)["optimizer"]
    need = sum(state_bytes(parameters, 3, ranks).values()) - spared + other_bytes
    if need <= cap_bytes:
        return Verdict(lost.part, text, f"stage 3 with offload_optimizer would fit: {need / GIB:.2f} GiB")
    return Verdict(lost.part, text, "no stage would fit on so many ranks: stage 3 with offload_param, or more ranks")


# ---------------------------------------------------------------- numbers


class FirstNotFinite:
    """Watches a model's forward pass: the first module that makes something not finite of what was finite."""

    def __init__(self, model: nn.Module) -> None:
        self.name = ""
        self.handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if not list(module.children())
        ]

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not self.name and torch.is_tensor(output) and not torch.isfinite(output).all():
                self.name = f"{name} ({type(module).__name__})"

        return look

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class Step:
    """What one step showed."""

    loss: float
    scale: float  # that its loss was multiplied by
    skipped: bool


def of_numbers(steps: Sequence[Step], first_not_finite: str) -> Verdict | None:
    """Steps that were skipped: was the loss scale too high, or is there a NaN in the model? None: nothing is wrong.

    A gradient that is too large for float16 at one scale is not at a smaller one, and the loss, taken before it is
    scaled, is finite throughout. A NaN is one at every scale, and in the loss too.
    """
    skipped = [step for step in steps if step.skipped]
    if first_not_finite or any(step.loss != step.loss or abs(step.loss) == float("inf") for step in steps):
        where = first_not_finite or "the loss itself"
        return Verdict(
            "nan",
            f"a real NaN or infinity, not the loss scale: {len(skipped)} of {len(steps)} steps skipped, the loss is "
            f"{steps[-1].loss}, and it comes first out of {where}",
            "look at that module's weights and inputs: no smaller scale can help",
        )
    if not skipped:
        return None
    if not steps[-1].skipped:
        return Verdict(
            "overflow",
            f"loss scale too high at the start: {len(skipped)} steps skipped while it fell from {skipped[0].scale:g} "
            f"to {steps[-1].scale:g}, every loss finite",
            f"nothing is lost but these: fp16.initial_scale_power {int(steps[-1].scale).bit_length() - 1}, or bf16",
        )
    return Verdict(
        "overflow",
        f"gradients overflow float16 at every scale so far ({skipped[0].scale:g} to {steps[-1].scale:g})",
        "go on until the scale has fallen far enough, or take bf16",
    )


# ---------------------------------------------------------------- offload


def of_offload(
    step_s: float, compute_s: float, read_bytes: int, written_bytes: int, read_speed: float, write_speed: float
) -> Verdict | None:
    """Where the time of an optimizer step goes whose state is on a disk.

    Args:
        step_s: of engine.step(); compute_s: the same with the state in memory.
        read_bytes, written_bytes: that the step moved.
        read_speed, write_speed: bytes/s of the same disk and interface, asked for large blocks and several at a time.
    """
    least = read_bytes / read_speed + written_bytes / write_speed
    on_disk = max(0.0, step_s - compute_s)
    share = on_disk / step_s
    text = (
        f"the optimizer step takes {step_s:.2f} s, {share:.0%} of it the disk's: "
        f"{(read_bytes + written_bytes) / 1e6:.0f} MB in {on_disk:.2f} s, which the disk as measured can do in "
        f"{least:.2f} s"
    )
    if share < 0.5:
        return None
    if on_disk > 2 * least:
        return Verdict("aio", text, "it is the aio section: block_size 1 MiB or more, queue_depth 8 or more")
    return Verdict("disk", text, "the disk itself is the limit: a faster one, a striped one, or offload to the CPU")

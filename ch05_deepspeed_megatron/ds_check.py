"""Is a DeepSpeed config right? Asked of DeepSpeed itself, before a model is built or a rank started.

DeepSpeed validates some sections by pydantic, where an unknown key is an error, and reads the others key by key, where
"gradient_cliping" is passed over in silence. So it is handed a dictionary that notes what it is asked for: a key that
nobody asks for is a mistake, and the nearest that somebody did ask for is what was meant.
"""

from __future__ import annotations

import difflib
import inspect
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ch04_fsdp import zero_peers
from common.script import UserError

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SECTIONS = (
    "zero_optimization", "bf16", "fp16", "optimizer", "activation_checkpointing", "aio", "checkpoint", "pipeline",
    "data_types", "flops_profiler", "comms_logger", "timers", "compile", "torch_autocast", "tensorboard", "csv_monitor",
)  # fmt: skip
# Which DeepSpeed reads elsewhere, or takes whole
ALSO_KNOWN = {
    "sequence_parallel_size": set(),
    "optimizer": {"type", "params", "legacy_fusion"},
    "pipeline": {"stages", "partition", "seed_layers", "activation_checkpoint_interval", "pipe_partitioned",
                 "grad_partitioned", "use_reentrant"},
}  # fmt: skip
ADAMS = ("adam", "adamw")
OF_ADAM = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}  # taken by DeepSpeed before they reach an optimizer
GIVEN_BY_DEEPSPEED = {"params", "model_params", "adamw_mode", "max_grad_norm"}  # the last is refused
OF_ALL = ("lr", "betas", "eps", "weight_decay")


class Asked(dict):
    """A section that notes which of its keys are asked for, and the default that stands for each.

    `__iter__` makes Python go through `__getitem__` for f(**section) too, and DeepSpeed copies only the outermost.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: Asked(value) if isinstance(value, dict) else value for key, value in values.items()})
        self.defaults: dict[str, Any] = {}

    def __copy__(self) -> Asked:
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def __contains__(self, key: object) -> bool:
        self.defaults.setdefault(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.defaults.setdefault(key, None)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.defaults[key] = default
        return super().get(key, default)


def check(settings: Mapping[str, Any], ranks: int) -> None:
    """Hold settings against DeepSpeed's own config class, and against each other. Starts nothing.

    Raises:
        UserError: a key is unknown, a value has the wrong type or range, or two contradict each other.
    """
    zero_peers.library(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    for name in SECTIONS:
        if not isinstance(settings.get(name, {}), dict):
            raise UserError(f"{name} is {settings[name]!r}; it is a section: take {{...}}")
    _check_batch(settings, ranks)
    asked = Asked({key: value for key, value in settings.items() if key not in BATCH} | {BATCH[0]: ranks})
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        raise UserError(_of_pydantic(error, settings)) from None
    except (AssertionError, ValueError, DeepSpeedConfigError) as error:
        raise UserError(f"{' '.join(str(error).split())}; see deepspeed.ai/docs/config-json") from None
    except (TypeError, AttributeError) as error:
        for key, value in dict.items(asked):
            _check_kind(key, value, asked.defaults.get(key))
        raise UserError(f"a value has the wrong type ({error}); see deepspeed.ai/docs/config-json") from None
    _check_asked(asked)
    zero = settings.get("zero_optimization", {})
    _check_optimizer(settings.get("optimizer"), (zero.get("offload_optimizer") or {}).get("device", "none") != "none")
    _check_zero(zero)


def _check_batch(settings: Mapping[str, Any], ranks: int) -> None:
    for name in BATCH:
        value = settings.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} is {value!r}; take a whole number above 0")
    total, micro, times = (settings.get(name) for name in BATCH)
    if total is None and micro is None:
        raise UserError(f"neither {BATCH[0]} nor {BATCH[1]} is there; give one of them")
    parts = (micro or 1) * (times or 1) * ranks
    if total and (total % parts or (micro and times and total != parts)):
        raise UserError(
            f"train_batch_size {total} is not {micro or '?'} a micro-batch x {times or '?'} micro-batches x {ranks} "
            "ranks; change one of them, or leave one out"
        )


def _check_asked(section: Asked, where: str = "") -> None:
    """Keys that DeepSpeed has not asked for, and values of another kind than the default that stands for them."""
    also = ALSO_KNOWN.get(where, ()) if where else {*ALSO_KNOWN, *BATCH}
    if not section.defaults and not also:  # pydantic has taken it whole, and looked at it
        return
    for key, value in dict.items(section):
        if key not in section.defaults and key not in also:
            raise UserError(_unknown(key, where, {*section.defaults, *also}))
        name = f"{where}.{key}" if where else key
        if isinstance(value, Asked):
            _check_asked(value, name)
        else:
            _check_kind(name, value, section.defaults.get(key))


def _check_kind(name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; take true or false")
    elif isinstance(default, int | float) and (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
    ):
        raise UserError(f"{name} is {value!r}; take a number, 0 or more (without it: {default!r})")


def _check_optimizer(optimizer: Mapping[str, Any] | None, offloaded: bool) -> None:
    """Names by the signature of the very optimizer that DeepSpeed would make. Its own are compiled when they are made,
    so the values that all have are judged by torch's AdamW."""
    if optimizer is None:
        return
    given = optimizer.get("params", {})
    made = _optimizer_class(str(optimizer.get("type")), given, offloaded)
    if made is None:
        return  # what it takes is known when it is made
    known = set(inspect.signature(made).parameters) - GIVEN_BY_DEEPSPEED
    if str(optimizer["type"]).lower() in ADAMS:
        known |= OF_ADAM
    for name in given:
        if name not in known:
            raise UserError(_unknown(name, "optimizer.params", known))
    if made.__module__.startswith("torch."):
        judge, judged = made, {name: value for name, value in given.items() if name not in OF_ADAM}
    else:
        judge, judged = torch.optim.AdamW, {name: given[name] for name in OF_ALL if name in given}
    try:
        judge([torch.nn.Parameter(torch.zeros(1))], **judged)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"optimizer.params: {error}; see torch.optim.{judge.__name__}") from None


def _optimizer_class(name: str, given: Mapping[str, Any], offloaded: bool) -> Any:
    """What DeepSpeedEngine._configure_basic_optimizer makes of a type; None: not to be told without a model.

    Raises:
        UserError: there is no such optimizer.
    """
    from deepspeed.ops import adagrad, adam, lamb, lion
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    kind = name.lower()
    if kind in ADAMS and given.get("torch_adam"):
        return torch.optim.AdamW if kind == "adamw" or given.get("adam_w_mode", True) else torch.optim.Adam
    own = {
        "adam": adam.DeepSpeedCPUAdam if offloaded else adam.FusedAdam,
        "adagrad": adagrad.DeepSpeedCPUAdagrad if offloaded else torch.optim.Adagrad,
        "lamb": lamb.FusedLamb,
        "lion": lion.DeepSpeedCPULion if offloaded else lion.FusedLion,
    }
    own["adamw"] = own["adam"]
    if kind in DEEPSPEED_OPTIMIZERS:
        return own.get(kind)
    classes = {key: value for key, value in vars(torch.optim).items() if inspect.isclass(value)}
    if name not in classes:
        known = [c.__name__ for c in classes.values()]
        raise UserError(_unknown(name, "optimizer.type", [*known, *own], "value"))
    return classes[name]


def _check_zero(zero: Mapping[str, Any]) -> None:
    """What DeepSpeed accepts and then ignores, or finds out when the ranks have long been at work."""
    stage = zero.get("stage", 0)
    for what, least in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(what) or {}
        if (device := offload.get("device", "none")) == "none":
            continue
        if stage < least:
            raise UserError(f"zero_optimization.{what} needs stage {least} or more, and stage is {stage}; change one")
        if device == "nvme" and stage < 3:
            raise UserError(f"zero_optimization.{what} to nvme needs stage 3, and stage is {stage}; change one")
        path = offload.get("nvme_path")
        if device == "nvme" and not (path and Path(path).is_dir()):
            raise UserError(f"zero_optimization.{what}.nvme_path is {path!r}; name a folder on the disk to use")
    devices = [(zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("param", "optimizer")]
    if devices == ["nvme", "none"]:
        raise UserError(
            "zero_optimization.offload_param to nvme leaves the optimizer, three times as large, in memory; offload it"
        )


def _of_pydantic(error: Any, settings: Mapping[str, Any]) -> str:
    """The first of pydantic's complaints in one line, with the section that it does not know about."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    section = _section_of(path, settings) or []
    if first["type"] != "extra_forbidden":
        return f"{'.'.join([*section, *path])} is {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}"
    model = next(found for found in _subclasses(DeepSpeedConfigModel) if found.__name__ == error.title)
    for part in path[:-1]:
        inside = model.model_fields[part].annotation
        model = next((one for one in typing.get_args(inside) if hasattr(one, "model_fields")), inside)
    known = {field.alias or name for name, field in model.model_fields.items()}
    return _unknown(path[-1], ".".join([*section, *path[:-1]]), known)


def _section_of(path: list[str], settings: Mapping[str, Any]) -> list[str] | None:
    """The keys that lead to the section in which there is such a path."""
    inside: Any = {"": settings}
    for part in ["", *path]:
        if not isinstance(inside, Mapping) or part not in inside:
            break
        inside = inside[part]
    else:
        return []
    for name, value in settings.items():
        if isinstance(value, Mapping) and (inner := _section_of(path, value)) is not None:
            return [name, *inner]
    return None


def _subclasses(kind: type) -> Iterator[type]:
    for found in kind.__subclasses__():
        yield found
        yield from _subclasses(found)


def _unknown(name: str, section: str, known: Iterable[str], what: str = "key") -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    told = f"did you mean {near[0]!r}" if near else "see deepspeed.ai/docs/config-json"
    return f"DeepSpeed knows no {what} {name!r}{f' in {section}' if section else ''}; {told}"

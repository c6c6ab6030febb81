"""An engine's options: read from a YAML file and checked against the engine's own parser, before anything starts.

A file holds the engine's own names, as `vllm serve --config` reads them. Two things are ours: what stands under
`cpu:` holds where no GPU is visible, over what stands above; and `made:nano`, `made:nano/lora` are folders of
make_model.py.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ch06_vllm.servers import ENGINES, program
from common.bootstrap import engine_environment, gpus_visible
from common.script import UserError, atomic_write

Options = dict[str, Any]
OURS = "cpu"
# Run by the engine's python, behind what makes its parser: every option with what it takes, as argparse has it.
ASK = """
import json
options = {}
for action in parser._actions:
    for flag in action.option_strings:
        if flag.startswith("--") and not flag.startswith("--no-"):
            kind = getattr(action.type, "__name__", "") if action.nargs != 0 else "flag"
            choices = [choice for choice in action.choices or [] if isinstance(choice, (str, int))]
            options[flag[2:]] = {"kind": kind, "choices": choices}
print("OPTIONS " + json.dumps(options))
"""


@functools.cache
def known(engine: str = "vllm") -> dict[str, Options]:
    """Each option of the engine: its kind (flag, int, float ...) and choices. Asked once for each environment.

    Raises:
        UserError: there is no such environment, or it does not answer.
    """
    title, path = ENGINES[engine].title, engine_environment(engine) / "serve_options.json"
    ask = [program(engine, "python"), "-c", ENGINES[engine].parser + ASK]
    if not path.exists():
        env = {**os.environ, **ENGINES[engine].environment(1)}
        asked = subprocess.run(ask, env=env, capture_output=True, text=True, timeout=300, check=False)
        told = [line for line in asked.stdout.splitlines() if line.startswith("OPTIONS ")]
        if not told:
            last = (asked.stderr.strip().splitlines() or ["no output"])[-1]
            again = f"remove {path.parent}, make setup-{engine}"
            raise UserError(f"{title} does not say what options it has ({last}); {again}")
        with atomic_write(path) as file:
            file.write(told[-1].removeprefix("OPTIONS "))
    found: dict[str, Options] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read(path: Path, changes: Iterable[str] = (), *, laptop: bool | None = None, engine: str = "vllm") -> Options:
    """The options in a YAML file, with `key=value` changes over them.

    Args:
        laptop: whether what is under `cpu:` holds (default: if no GPU is visible).

    Raises:
        UserError: no such file, no YAML, or an option that the engine does not know or whose value it would refuse.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); see the configs folder of the chapter for some"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())[:160]}); correct that line") from None
    if not isinstance(options, dict):
        raise UserError(f"{path} holds no options; write `model: FOLDER` and others, a line each")
    small = options.pop(OURS, None) or {}
    if not isinstance(small, dict):
        raise UserError(f"{path}: {OURS} holds {small!r}; write options under it, indented")
    for part in (options, small):
        check(part, str(path), engine)
    options = {key.replace("_", "-"): value for key, value in options.items()}
    if laptop or (laptop is None and not gpus_visible()):
        options |= {key.replace("_", "-"): value for key, value in small.items()}
    for change in changes:
        apply(options, change, engine)
    if not options.get("model"):
        raise UserError(f"{path} names no model; write `model: FOLDER`, or --set model=FOLDER")
    return {key: value for key, value in options.items() if value is not None}


def apply(options: Options, change: str, engine: str = "vllm") -> None:
    """One --set: `max-num-seqs=8`, or `speculative-config.num_speculative_tokens=2` for one value of several."""
    key, equals, text = change.partition("=")
    name, dot, inner = key.strip().partition(".")
    name = name.replace("_", "-")
    if not (equals and name):
        raise UserError(f"--set {change!r} is not KEY=VALUE; write it so")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {change!r}: the value cannot be read as YAML; quote it") from None
    if dot:
        whole = options.get(name)
        value = {**(whole if isinstance(whole, Mapping) else {}), inner: value}
    check({name: value}, "--set", engine)
    options[name] = value


def check(options: Mapping[str, Any], where: str, engine: str = "vllm") -> None:
    """Raises UserError for the first option that the engine does not have, or whose value it would refuse."""
    for key, value in options.items():
        name = str(key).replace("_", "-")
        option = known(engine).get(name)
        if option is None:
            near = difflib.get_close_matches(name, known(engine), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}" if near else f"see {ENGINES[engine].help}"
            raise UserError(f"{where}: {ENGINES[engine].title} has no option {key}; {hint}")
        kinds = {"flag": (bool, "true or false"), "int": (int, "a whole number"), "float": ((int, float), "a number")}
        kind, words = kinds.get(option["kind"], (object, ""))
        right = isinstance(value, kind) and (option["kind"] == "flag" or not isinstance(value, bool))
        if value is not None and not right:
            raise UserError(f"{where}: {key} is {value!r}; it must be {words}")
        values = value if isinstance(value, list) else [value]
        if option["choices"] and value is not None and (wrong := [v for v in values if v not in option["choices"]]):
            raise UserError(f"{where}: {key} is {wrong[0]!r}; it is one of {', '.join(map(str, option['choices']))}")


def make_models(value: Any, *, make: bool = True) -> Any:
    """`made:PRESET` and `made:PRESET/KIND`, wherever they stand in the options, as folders that exist.

    `make=False`: as those that will; one of KIND stays as it is while there is no model to derive it from.
    """
    if isinstance(value, Mapping):
        return {key: make_models(inner, make=make) for key, inner in value.items()}
    if isinstance(value, list):
        return [make_models(inner, make=make) for inner in value]
    if isinstance(value, str) and "made:" in value:
        return re.sub(
            r"\bmade:(\w+)(?:/(\w+))?",
            lambda match: str(made(match[1], match[2] or "model", make) or match[0]),
            value,
        )
    return value


def made(preset: str, kind: str, make: bool) -> Path | None:
    from ch06_vllm import make_model  # with transformers, which takes seconds

    derive = {"lora": make_model.adapter, **make_model.KINDS}
    if kind not in ("model", *derive):
        raise UserError(f"made:{preset}/{kind} cannot be made; KIND is one of {', '.join(derive)}")
    folder = make_model.model_folder(make_model.Recipe(preset), make=make)
    if kind == "model":
        return folder
    return Path(derive[kind](folder, make=make)) if folder.exists() else None

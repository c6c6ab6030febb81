"""ENGINE and ENGINE:MODEL on a command line, and the server that a script starts for itself."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ch06_vllm.servers import ENGINES, Server
from common.script import UserError

HELP = "ENGINE:MODEL, ours or vllm (chapter 7: sglang), and a preset (random weights, made once) or a model's folder"


def engine_name(text: str) -> str:
    """argparse type: ours, vllm, or another of servers.ENGINES.

    Raises:
        UserError: the engine's environment has not been made. It is said here, before a model is.
    """
    if text not in ENGINES:
        raise argparse.ArgumentTypeError(f"{text!r} is no engine; take {' or '.join(ENGINES)}")
    ENGINES[text].environment(1)
    return text


def engine_and_model(text: str) -> tuple[str, str]:
    """argparse type: ENGINE:MODEL. Raises as engine_name does."""
    engine, _, model = text.partition(":")
    if engine not in ENGINES or not model:
        raise UserError(f"{text!r} is not ENGINE:MODEL; ENGINE is {' or '.join(ENGINES)}, MODEL a preset or a folder")
    return engine_name(engine), model


def folder_of(model: str, dtype: str = "bfloat16") -> Path:
    """The folder of a preset, made on first use with weights of this type, or the one that is named."""
    from ch06_vllm import make_model  # with transformers, which takes seconds
    from common import lm

    return make_model.model_folder(make_model.Recipe(model, dtype=dtype)) if lm.is_preset(model) else Path(model)


def server(asked: tuple[str, str], options: Mapping[str, Any] | None = None) -> Server:
    """The server of ENGINE:MODEL, not entered yet; it is asked for MODEL by that name."""
    engine, model = asked
    return Server(folder_of(model), engine, {"served-model-name": model} | dict(options or {}))

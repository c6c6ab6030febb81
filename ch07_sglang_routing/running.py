"""A SGLang to show something on: one that runs already (--url), or one started for the script."""

from __future__ import annotations

import argparse
import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ch06_vllm import load, started
from ch06_vllm.servers import models, use_device
from ch07_sglang_routing import sglang_engine  # noqa: F401  it is an engine from here on
from common.script import UserError

URL = (
    "a SGLang that runs already, with that model, --enable-cache-report and --enable-metrics "
    "(structured: with --constrained-json-disable-any-whitespace)"
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", help="a preset (random weights, made once) or a model's folder")
    parser.add_argument("--url", help=URL)


@contextlib.contextmanager
def sglang(args: argparse.Namespace, options: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str]]:
    """Its address, and the name that requests call the model by. `options` are for one that is started here.

    Raises:
        UserError: nothing answers at --url, or it does not report what it found in its cache.
    """
    if args.url:
        try:
            name = models(args.url)[0]
        except (OSError, ValueError) as error:
            raise UserError(f"{args.url} does not answer ({error}); start SGLang there, or leave --url away") from None
        if not info(args.url).get("enable_cache_report"):
            raise UserError(f"{args.url} does not report its cache; start SGLang there with --enable-cache-report")
        yield args.url.rstrip("/"), name
        return
    use_device(args.device)
    started.engine_name("sglang")
    with started.server(("sglang", args.model), options) as server:
        yield server.url, server.model


def info(url: str) -> dict[str, Any]:
    """How this SGLang was started, with what it decided itself.

    Raises:
        UserError: it does not say; it is no SGLang.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/server_info", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except (OSError, ValueError) as error:
        raise UserError(f"{url}/server_info does not answer ({error}); is this SGLang?") from None


def ids(args: argparse.Namespace) -> Any:
    """Token ids that may stand in a prompt of this model."""
    return load.usable_ids(Path(started.folder_of(args.model)))


def flush(url: str) -> None:
    """Empty the radix cache; SGLang does so only while it has nothing to do.

    Raises:
        UserError: it did not.
    """
    try:
        request = urllib.request.Request(f"{url}/flush_cache?timeout=30", method="POST")
        urllib.request.urlopen(request, timeout=60).close()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{url} did not empty its cache ({error}); see that no other requests run there") from None

"""What a custom resource's fields need of each other: the CEL rules in its published schema, evaluated.

A rule stands at a part of the schema (`x-kubernetes-validations`) and sees the value there as `self`, with the schema's
defaults filled in. Rules with `oldSelf` compare with what is stored: they hold for what is new. Source: Kubernetes
documentation, Custom Resource Definitions, Validation rules; language: cel-spec.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import cel

Schema = dict[str, Any]


def broken(schema: Schema, data: Any) -> list[str]:
    """One line for each rule that does not hold: where, and the rule's own message."""
    return list(_broken(schema, with_defaults(schema, copy.deepcopy(data)), ""))


def with_defaults(schema: Schema, value: Any) -> Any:
    """Fill in what is not there, from the outside in; the value is changed."""
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
    for inner, _, below in _inside(schema, value):
        with_defaults(inner, below)
    return value


def _inside(schema: Schema, value: Any) -> Iterator[tuple[Schema, str, Any]]:
    if isinstance(value, dict):
        others = schema.get("additionalProperties")
        for name, below in value.items():
            inner = schema.get("properties", {}).get(name, others)
            if isinstance(inner, dict):
                yield inner, f".{name}", below
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, below in enumerate(value):
            yield schema["items"], f"[{index}]", below


def _broken(schema: Schema, value: Any, at: str) -> Iterator[str]:
    for one in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in one["rule"]:
            continue
        message = one.get("message") or f"{one['rule']} does not hold"
        try:
            holds = cel.evaluate(one["rule"], {"self": value})
        except Exception as error:  # of many types; a server refuses then, too
            holds, message = False, f"{one['rule']} cannot be evaluated ({str(error)[:100]})"
        if holds is not True:
            yield f"{at.lstrip('.') or 'the object'}: {message}; correct it"
    for inner, name, below in _inside(schema, value):
        yield from _broken(inner, below, at + name)

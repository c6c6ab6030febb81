"""PromQL wherever it stands: rules, KEDA triggers, dashboards, the adapter's values.

Parsed, then: names that the engine's version has, counters under rate or increase, quantiles that keep `le`, and for
KEDA a result of one series however many replicas there are.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser

from ch08_kubernetes.lint.objects import Finding, Object, mapping

METRICS = Path(__file__).parent / "metrics"
OVER_TIME = {"rate", "irate", "increase", "resets", "changes", "delta"}
# Functions of one vector whose result has the series of their argument.
SAME_SERIES = {"abs", "ceil", "floor", "round", "clamp", "clamp_min", "clamp_max", "sqrt", "ln", "exp", "sgn"}
# What Grafana fills in; a variable inside a label matcher needs no value.
GRAFANA = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h", "${__rate_interval}": "5m"}


@dataclass(frozen=True)
class Query:
    owner: Object
    where: str
    text: str
    one_series: bool = False


@functools.cache
def known() -> frozenset[str]:
    """Names of samples in metrics/: engines, exporters, and the book's own servers."""
    lines = (line for at in METRICS.glob("*.txt") for line in at.read_text(encoding="utf-8").splitlines())
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def queries(owner: Object) -> Iterator[Query]:
    """The queries in an object."""
    if owner.kind == "PrometheusRule":
        for group in owner.spec.get("groups") or []:
            for rule in group.get("rules") or []:
                name = rule.get("alert") or rule.get("record") or "?"
                yield Query(owner, str(name), str(rule.get("expr", "")))
    elif owner.kind in ("ScaledObject", "ScaledJob"):
        for index, trigger in enumerate(owner.spec.get("triggers") or []):
            if trigger.get("type") == "prometheus":
                text = str(mapping(trigger.get("metadata")).get("query", ""))
                yield Query(owner, f"trigger {index}", text, one_series=True)
    elif owner.kind == "ConfigMap":  # as kustomize makes them of dashboards
        for name, text in mapping(owner.data.get("data")).items():
            if name.endswith(".json"):
                yield from panels(owner, json.loads(text).get("panels") or [])
    elif "panels" in owner.data:
        yield from panels(owner, owner.data["panels"])
    elif "prometheus-adapter" in owner.path.name:
        for rule in mapping(owner.data.get("rules")).get("custom") or []:
            yield Query(owner, "seriesQuery", str(rule.get("seriesQuery", "")))


def panels(owner: Object, listed: list[dict[str, Any]]) -> Iterator[Query]:
    for panel in listed:
        yield from panels(owner, panel.get("panels") or [])
        for target in panel.get("targets") or []:
            if "expr" in target:
                yield Query(owner, f"panel {panel.get('title')!r}", str(target["expr"]))


def recorded(objects: list[Object]) -> set[str]:
    """Names that recording rules make."""
    rules = [r for o in objects if o.kind == "PrometheusRule" for g in o.spec.get("groups") or [] for r in g["rules"]]
    return {str(rule["record"]) for rule in rules if "record" in rule}


def check(objects: list[Object]) -> Iterator[Finding]:
    names = known() | recorded(objects)
    for owner in objects:
        yield from triggers(owner)
        for query in queries(owner):
            for message in faults(query.text, names, query.one_series, raw="prometheus-adapter" in owner.path.name):
                yield owner.finding("promql", f"{query.where}: {message}")


def faults(text: str, names: frozenset[str] | set[str], one: bool = False, raw: bool = False) -> Iterator[str]:
    """What is wrong with a query. `one`: it must give one series. `raw`: counters may stand alone (a series query)."""
    for variable, value in GRAFANA.items():
        text = text.replace(variable, value)
    try:
        tree = promql_parser.parse(text)
    except ValueError as error:
        yield f"cannot be parsed ({str(error).splitlines()[0][:120]}); mend the query"
        return
    for selector, parents in selectors(tree):
        name = selector.name or next((m.value for m in selector.matchers.matchers if m.name == "__name__"), "")
        if name not in names:
            yield f"no metric {name!r} in lint/metrics/ or a recording rule; take a name that the version has"
        counter = re.search(r"(_total|_bucket|_count|_sum)$", name)
        if counter and not raw and not OVER_TIME & set(parents) and "count" not in parents:
            yield f"{name} only ever grows; take rate() or increase() of it"
    for node in calls(tree):
        if node.func.name == "histogram_quantile" and not keeps_le(node.args[1]):
            yield "histogram_quantile needs the buckets apart; aggregate by (le, ...)"
    if one and not single(tree):
        yield "gives a series for each replica, and KEDA takes one; aggregate with sum(...) or max(...), without by"


def children(node: Any) -> list[Any]:
    if isinstance(node, promql_parser.Call):
        return list(node.args)
    if isinstance(node, promql_parser.BinaryExpr):
        return [node.lhs, node.rhs]
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    return [node.expr] if hasattr(node, "expr") else []


def calls(node: Any) -> Iterator[Any]:
    if isinstance(node, promql_parser.Call):
        yield node
    for inner in children(node):
        yield from calls(inner)


def selectors(node: Any, parents: tuple[str, ...] = ()) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Each selector of a query with the functions and aggregations around it, outermost first."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node, parents
    around = parents
    if isinstance(node, promql_parser.Call):
        around = (*parents, node.func.name)
    elif isinstance(node, promql_parser.AggregateExpr):
        around = (*parents, str(node.op))
    for inner in children(node):
        yield from selectors(inner, around)


def keeps_le(node: Any) -> bool:
    """The buckets' label `le` is still there."""
    if isinstance(node, promql_parser.AggregateExpr):
        modifier = node.modifier
        by = modifier is not None and modifier.type == promql_parser.AggModifierType.By
        kept = ("le" in modifier.labels) == by if modifier is not None else False
        return kept and keeps_le(node.expr)
    return all(keeps_le(inner) for inner in children(node))


def single(node: Any) -> bool:
    """The query gives one series at most, without labels, or a number."""
    if isinstance(node, promql_parser.NumberLiteral):
        return True
    if isinstance(node, promql_parser.AggregateExpr):
        plain = str(node.op) in ("sum", "max", "min", "avg", "count", "group", "stddev", "stdvar", "quantile")
        modifier = node.modifier
        by_nothing = modifier is None or (
            modifier.type == promql_parser.AggModifierType.By and not list(modifier.labels)
        )
        return plain and by_nothing
    if isinstance(node, promql_parser.Call):
        if node.func.name in ("scalar", "vector", "time", "absent"):
            return True
        return node.func.name in {*SAME_SERIES, "histogram_quantile"} and any(single_vector(a) for a in node.args)
    if isinstance(node, promql_parser.BinaryExpr):
        return single(node.lhs) and single(node.rhs)
    return isinstance(node, promql_parser.ParenExpr | promql_parser.UnaryExpr) and single(node.expr)


def single_vector(node: Any) -> bool:
    """One series, or for histogram_quantile one for each bucket bound."""
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        by = node.modifier.type == promql_parser.AggModifierType.By
        return by and set(node.modifier.labels) <= {"le"}
    return not isinstance(node, promql_parser.NumberLiteral) and single(node)


def triggers(owner: Object) -> Iterator[Finding]:
    """KEDA's triggers: parameters that the version has, and all that it needs."""
    if owner.kind not in ("ScaledObject", "ScaledJob"):
        return
    for index, trigger in enumerate(owner.spec.get("triggers") or []):
        kind = trigger.get("type")
        if kind not in keda():
            yield owner.finding(
                "keda", f"trigger {index} is a {kind}, which lint/crds/keda-triggers.json lacks; add it"
            )
            continue
        given = set(mapping(trigger.get("metadata")))
        # Some may come from the container's environment: passwordFromEnv.
        for name in sorted(n for n in given if n.removesuffix("FromEnv") not in keda()[kind]["names"]):
            yield owner.finding(
                "keda", f"trigger {index}: {kind} has no {name}; it has {', '.join(keda()[kind]['names'])}"
            )
        for name in sorted(set(keda()[kind]["needed"]) - given):
            yield owner.finding("keda", f"trigger {index}: {kind} needs {name}; set it")


@functools.cache
def keda() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((METRICS.parent / "crds/keda-triggers.json").read_text(encoding="utf-8"))
    found.pop("source")
    return found

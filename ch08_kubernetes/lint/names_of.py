"""The metrics that an installed engine declares, as Prometheus sees them, for metrics/.

    python -m ch08_kubernetes.lint.names_of vllm 0.32.0 FOLDER_OF_THE_PACKAGE

Read from its source: prometheus_client's Counter, Gauge, Histogram and Summary with a literal name. Sample names follow
prometheus_client: a counter ends in _total; a histogram has _bucket, _sum and _count, a summary the last two.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}


def declared(source: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(type, name) of a module's metrics: Gauge(name="vllm:x"), self._counter_cls(name=...), Counter("..."), ..."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        kind = next((k for k in (*SUFFIXES, "gauge") if k in called.lower()), None)
        names = [keyword.value for keyword in node.keywords if keyword.arg == "name"] or node.args[:1]
        if kind and names and isinstance(names[0], ast.Constant) and str(names[0].value).startswith(prefix):
            yield kind, str(names[0].value)


def samples(kind: str, name: str) -> list[str]:
    """The names of a metric's samples on the page that Prometheus reads."""
    if kind == "counter":
        return [name.removesuffix("_total") + "_total"]
    return [name + suffix for suffix in SUFFIXES.get(kind, ("",))]


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("engine", help="the prefix: vllm or sglang")
    made.add_argument("version")
    made.add_argument("package", type=Path)
    args = made.parse_args(argv)
    found: set[str] = set()
    for path in args.package.rglob("*.py"):
        source = path.read_text(encoding="utf-8", errors="replace")
        if f"{args.engine}:" in source:
            found |= {s for kind, name in declared(source, f"{args.engine}:") for s in samples(kind, name)}
    if not found:
        sys.exit(f"error: no metric of {args.engine} in {args.package}; name the folder of the installed package")
    print(f"# {args.engine} {args.version}: names of samples, from its source by names_of.py", *sorted(found), sep="\n")


if __name__ == "__main__":
    main()

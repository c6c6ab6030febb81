"""What KEDA is told: each query of the ScaledObjects asked of a real Prometheus that scrapes 1, 2 and 5 replicas.

You learn   why a query that works with one replica fails with two (KEDA takes one series), and what the numbers are
Laptop      python -m ch08_kubernetes.autoscaling.keda_queries                    (prometheus: make system-deps)
Cluster     the same queries, after kubectl -n monitoring port-forward service/prometheus-operated 9090
You see     for each query the series and the value with 1, 2 and 5 replicas beside the same query without its
            aggregation; then every rule (by promtool, and loaded) and dashboard panel, evaluated

The replicas are small servers with the metrics of chapter 6's engine, made by the engine's own code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import promql_parser
import yaml

from ch06_vllm.engine.engine import Engine
from ch06_vllm.engine.metrics import Metrics
from ch08_kubernetes.lint.objects import Object, read
from ch08_kubernetes.lint.promql import GRAFANA, Query, queries
from common import process, script
from common.ranks import free_port

HERE, MONITORING = Path(__file__).parent, Path(__file__).parents[1] / "monitoring"
HOST, JOB, NAMESPACE = "127.0.0.1", "inference/engines", "inference"
AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": sum, "avg": statistics.fmean, "max": max, "min": min, "count": len,
}  # fmt: skip


@dataclass(frozen=True)
class Replica:
    """What an engine would say of itself; usage: of its KV cache, 0 to 1."""

    waiting: int
    running: int
    usage: float

    def text(self) -> bytes:
        scheduler = SimpleNamespace(
            running=range(self.running),
            waiting=range(self.waiting),
            num_preemptions=0,
            prefix_queries=64,
            prefix_hits=32,
        )
        engine = SimpleNamespace(scheduler=scheduler, pool=SimpleNamespace(usage=self.usage))
        return Metrics(cast(Engine, engine), "nano").text()

    @property
    def truth(self) -> dict[str, float]:
        return {"vllm:num_requests_waiting": self.waiting, "vllm:num_requests_running": self.running,
                "vllm:kv_cache_usage_perc": self.usage}  # fmt: skip


REPLICAS = [Replica(3 + 2 * number, 8, 0.5 + 0.1 * number) for number in range(5)]


@contextlib.contextmanager
def served(text: bytes) -> Iterator[int]:
    """A /metrics that says this; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Killed(process.Child):
    """A program that has nothing to save when it is stopped."""

    def __exit__(self, *_: object) -> None:
        self.stop(grace_s=0)


class Prometheus:
    """A real one that scrapes these ports as the operator's would: job, namespace and pod are labels of each series.

    It takes 5 s to look for its targets: several start beside each other, and are waited for (`wait`) then.

    Raises:
        UserError: on entering: it is not installed.
    """

    def __init__(self, ports: Sequence[int], rules: Path | None = None, timeout_s: float = 60) -> None:
        self.ports, self.rules, self.timeout_s = ports, rules, timeout_s
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Prometheus:
        if not shutil.which("prometheus"):
            raise script.UserError("prometheus is not installed; run make system-deps (Debian), or install it")
        with self._stack:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            targets = [
                {"targets": [f"{HOST}:{port}"], "labels": {"namespace": NAMESPACE, "pod": f"engine-{number}"}}
                for number, port in enumerate(self.ports)
            ]
            config = {
                "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "250ms"},
                "rule_files": [str(self.rules)] if self.rules else [],
                "scrape_configs": [{"job_name": JOB, "static_configs": targets}],
            }
            (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
            port = free_port()
            self.url = f"http://{HOST}:{port}"
            self.child = self._stack.enter_context(Killed(
                ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address={HOST}:{port}", "--log.level=warn"]
            ))  # fmt: skip
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait(self) -> None:
        """Until each replica was scraped.

        Raises:
            UserError: it ends, with its own words, or it takes too long.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            with contextlib.suppress(OSError):
                if len(self.ask(f'up{{job="{JOB}"}} == 1')) == len(self.ports):
                    return
            if self.child.process.poll() is not None:
                self.child.wait(0)
                raise script.UserError(
                    f"prometheus ended ({(self.child.err or ['silent'])[-1].strip()[-300:]}); mend it"
                )
            if time.monotonic() > deadline:
                raise script.UserError(
                    f"prometheus has not scraped all after {self.timeout_s:g} s; is the machine busy?"
                )
            time.sleep(0.1)

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series now.

        Raises:
            UserError: it does not take the query, with its own words.
        """
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                data = json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it is starting
                return []
            raise script.UserError(f"{query!r}: {json.load(error)['error']}; mend the query") from None
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]


def load(folder: Path) -> list[Object]:
    """The objects in a folder's manifests and dashboards.

    Raises:
        UserError: one cannot be read.
    """
    found: list[Object] = []
    for path in sorted([*folder.glob("*.yaml"), *folder.rglob("*.json")]):
        each, faults = read(path)
        if faults:
            raise script.UserError(str(faults[0]))
        found += each
    return found


def of(folder: Path) -> list[Query]:
    """The queries in a folder's manifests, Grafana's variables filled in."""

    def plain(text: str) -> str:
        for variable, value in {**GRAFANA, "$namespace": ".*", "$node": ".*", "$model": ".*"}.items():
            text = text.replace(variable, value)
        return text

    return [Query(q.owner, q.where, plain(q.text), q.one_series) for each in load(folder) for q in queries(each)]


def expected(query: str, replicas: Sequence[Replica]) -> tuple[float, str]:
    """An aggregation's value by arithmetic, and the query without the aggregation."""
    tree = promql_parser.parse(query)
    inner = getattr(tree, "expr", None)
    if not isinstance(tree, promql_parser.AggregateExpr) or not isinstance(inner, promql_parser.VectorSelector):
        raise script.UserError(f"{query!r} is no plain aggregation; teach keda_queries.py its value")
    values = [replica.truth[str(inner.name)] for replica in replicas]
    return AGGREGATIONS[str(tree.op)](values), inner.prettify()


def check_rules(folder: Path) -> tuple[Path, int]:
    """A rule file of the PrometheusRules' groups, and how many rules promtool finds in it."""
    groups = [g for each in load(MONITORING) if each.kind == "PrometheusRule" for g in each.spec["groups"]]
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
    done = process.run(["promtool", "check", "rules", str(path)], timeout_s=60)
    if done.returncode:
        raise script.UserError(f"promtool refuses a rule ({(done.stderr or done.stdout).strip()[-300:]}); mend it")
    return path, sum(len(group["rules"]) for group in groups)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__)
    parser.add_argument("--replicas", type=script.comma_list(script.at_least(1)), default=[1, 2, 5], help="1 to 5 each")
    args: argparse.Namespace = parser.parse_args(argv)
    if max(args.replicas) > len(REPLICAS):
        raise script.UserError(f"--replicas {max(args.replicas)}; at most {len(REPLICAS)}")
    script.start(__file__, args)
    asked = [query for query in of(HERE) if query.one_series]
    result: dict[str, Any] = {"keda_queries": len(asked), "replicas": args.replicas}
    one, right, naive = [], [], []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = [stack.enter_context(served(replica.text())) for replica in REPLICAS]
        rules, result["rules"] = check_rules(folder)
        scraping = [stack.enter_context(Prometheus(ports[:count], rules)) for count in args.replicas]
        for count, prometheus in zip(args.replicas, scraping, strict=True):
            prometheus.wait()
            print(f"{count} replica{'s' if count > 1 else ''}")
            for query in asked:
                value, bare = expected(query.text, REPLICAS[:count])
                found, apart = prometheus.ask(query.text), prometheus.ask(bare)
                one.append(len(found) == 1)
                right.append(bool(found) and abs(found[0][1] - value) < 1e-9)
                naive.append(len(apart))
                print(f"  {len(found)} series, {found[0][1] if found else float('nan'):6.3g}   {query.text}\n"
                      f"  {len(apart)} series           {bare}")  # fmt: skip
        monitored = of(MONITORING)
        answered = sum(bool(prometheus.ask(query.text)) for query in monitored)  # UserError for a bad one
    print(
        f"{len(monitored)} queries of rules and panels evaluated, {answered} with an answer from these replicas alone"
    )
    per_query = naive[:: len(asked)]
    return result | {
        "always_one_series": all(one), "values_right": all(right), "series_without_sum": per_query,
        "monitoring_queries": len(monitored), "monitoring_answered": answered,
    }  # fmt: skip


if __name__ == "__main__":
    script.run(main)

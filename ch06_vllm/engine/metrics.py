"""What the engine counts, under vLLM's names, so that one dashboard, router or load test reads both.

Counts are plain Python numbers that the engine's thread adds to, a fraction of a microsecond each; Prometheus' format
is made of them when somebody asks. So a scrape waits for no step and no step for a scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ch06_vllm.engine.engine import Engine
    from ch06_vllm.engine.request import Output, Request

# vLLM's own buckets, in seconds
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
                 640, 2560)  # fmt: skip
BETWEEN_TOKENS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Histogram:
    """Of seconds."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.buckets, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), as Prometheus has it."""
        bounds = [*(str(float(bound)) for bound in self.buckets), "+Inf"]
        return list(zip(bounds, accumulate(list(self.counts)), strict=True))


class Timeline:
    """When things happened to a request, in time.perf_counter() seconds."""

    def __init__(self, request: Request, arrived_s: float) -> None:
        self.request, self.arrived_s = request, arrived_s
        self.first_s = self.last_s = 0.0  # its first token, its last so far


class Metrics(Collector):
    """Of one engine. `model_name` is a label of every figure, as is the number of the engine, which is 0."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.engine = engine
        self.labels = {"model_name": model_name, "engine": "0"}
        self.prompt_tokens = self.generation_tokens = 0
        self.finished = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self.first_token_s = Histogram(FIRST_TOKEN_S)
        self.between_tokens_s = Histogram(BETWEEN_TOKENS_S)
        self.latency_s, self.queue_s, self.prefill_s, self.decode_s = (Histogram(REQUEST_S) for _ in range(4))
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def token(self, timeline: Timeline, output: Output, now: float) -> None:
        """A request got a token, at `now`."""
        self.generation_tokens += len(output.token_ids)
        if timeline.first_s:
            self.between_tokens_s.observe(now - timeline.last_s)
        else:
            timeline.first_s = now
            self.prompt_tokens += output.prompt_tokens
            self.first_token_s.observe(now - timeline.arrived_s)
        timeline.last_s = now
        if output.finish_reason:
            self.finished[output.finish_reason] += 1
            self.latency_s.observe(now - timeline.arrived_s)
            self.queue_s.observe(timeline.request.scheduled_s - timeline.arrived_s)
            self.prefill_s.observe(timeline.first_s - timeline.request.scheduled_s)
            self.decode_s.observe(now - timeline.first_s)

    def text(self) -> bytes:
        """The answer to a scrape."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        scheduler = self.engine.scheduler
        for name, what, now in (
            ("num_requests_running", "Number of requests in model execution batches.", len(scheduler.running)),
            ("num_requests_waiting", "Number of requests waiting to be processed.", len(scheduler.waiting)),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", self.engine.pool.usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", what, labels=list(self.labels))
            gauge.add_metric(list(self.labels.values()), now)
            yield gauge
        for name, what, total in (
            ("prompt_tokens", "Number of prefill tokens processed.", self.prompt_tokens),
            ("generation_tokens", "Number of generation tokens processed.", self.generation_tokens),
            ("num_preemptions", "Cumulative number of preemption from the engine.", scheduler.num_preemptions),
            ("prefix_cache_queries", "Prefix cache queries, in number of tokens.", scheduler.prefix_queries),
            ("prefix_cache_hits", "Prefix cache hits, in number of cached tokens.", scheduler.prefix_hits),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", what, labels=list(self.labels))
            counter.add_metric(list(self.labels.values()), total)
            yield counter
        what = "Count of finished requests."
        success = CounterMetricFamily("vllm:request_success", what, labels=[*self.labels, "finished_reason"])
        for reason, total in list(self.finished.items()):
            success.add_metric([*self.labels.values(), reason], total)
        yield success
        for name, what, histogram in (
            ("time_to_first_token", "time to first token", self.first_token_s),
            ("inter_token_latency", "inter-token latency", self.between_tokens_s),
            ("e2e_request_latency", "e2e request latency", self.latency_s),
            ("request_queue_time", "time spent in WAITING phase", self.queue_s),
            ("request_prefill_time", "time spent in PREFILL phase", self.prefill_s),
            ("request_decode_time", "time spent in DECODE phase", self.decode_s),
        ):
            what = f"Histogram of {what} in seconds."
            family = HistogramMetricFamily(f"vllm:{name}_seconds", what, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), histogram.cumulative(), histogram.sum)
            yield family

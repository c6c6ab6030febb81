"""What an engine says of itself at /metrics, once or again and again while it works."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from types import TracebackType
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from common.script import UserError


class Metrics:
    """One answer of /metrics: metrics["vllm:num_requests_running"] is the sum over its labels (several replicas).

    Attributes:
        values: all of these sums by name.
        series: how many values a name has: of most, one for each replica.
        labels: of the last of them.
    """

    def __init__(self, text: str) -> None:
        self.values: dict[str, float] = {}
        self.series: Counter[str] = Counter()
        self.labels: dict[str, dict[str, str]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.values[sample.name] = self.values.get(sample.name, 0.0) + sample.value
                self.series[sample.name] += 1
                self.labels[sample.name] = sample.labels

    def __getitem__(self, name: str) -> float:
        """
        Raises:
            UserError: the engine has no such metric.
        """
        if name not in self.values:
            raise UserError(f"/metrics has no {name}; see which version of the engine this is")
        return self.values[name]


def scrape(url: str, timeout_s: float = 30) -> Metrics:
    """
    Raises:
        UserError: no answer.
    """
    return Scraper(url, timeout_s).read()


class Scraper:
    """Asks over one connection."""

    def __init__(self, url: str, timeout_s: float = 30) -> None:
        parts = urlsplit(url)
        self.url, self.connection = url, http.client.HTTPConnection(parts.netloc, timeout=timeout_s)

    def read(self) -> Metrics:
        try:
            self.connection.request("GET", "/metrics")
            answer = self.connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url}/metrics does not answer ({error}); see the server's log") from None
        if answer.status != 200:
            raise UserError(f"{self.url}/metrics says {answer.status}; is this an inference engine?")
        return Metrics(text)


class Sampler:
    """Reads /metrics every `interval_s` while the block runs: (perf_counter seconds, Metrics) in `samples`.

    Each reading takes some milliseconds of the server's time: an interval of 50 ms can be felt on two cores.
    """

    def __init__(self, url: str, interval_s: float = 0.05) -> None:
        self.samples: list[tuple[float, Metrics]] = []
        self._scraper, self._interval_s = Scraper(url), interval_s
        self._ended = threading.Event()
        self._error: UserError | None = None
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        try:
            while True:
                metrics = self._scraper.read()
                self.samples.append((time.perf_counter(), metrics))
                if self._ended.wait(self._interval_s):
                    return
        except UserError as error:
            self._error = error

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(60)
        if self._error and kind is None:
            raise self._error

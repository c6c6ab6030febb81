"""What an engine says of itself at /metrics."""

from __future__ import annotations

import contextlib
import http.client
from collections import defaultdict
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from common.script import UserError


class Metrics:
    """One answer of /metrics: metrics["vllm:num_requests_running"] is the sum over its labels (several replicas).

    Attributes:
        values: all of these sums by name.
        samples: each of them, with .labels and .value: of most, one for each replica.
    """

    def __init__(self, text: str) -> None:
        self.values: dict[str, float] = {}
        self.samples: defaultdict[str, list[Sample]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.values[sample.name] = self.values.get(sample.name, 0.0) + sample.value
                self.samples[sample.name].append(sample)

    def __getitem__(self, name: str) -> float:
        """
        Raises:
            UserError: the engine has no such metric.
        """
        if name not in self.values:
            raise UserError(
                f"/metrics has no {name} among its {len(self.values)}; see which version of the engine this is"
            )
        return self.values[name]


def scrape(url: str, timeout_s: float = 30) -> Metrics:
    """
    Raises:
        UserError: no answer.
    """
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url}/metrics does not answer ({error}); see the server's log") from None
    if answer.status != 200:
        raise UserError(f"{url}/metrics says {answer.status}; is this an inference engine?")
    return Metrics(text)

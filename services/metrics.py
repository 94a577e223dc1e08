"""Counters of the public endpoint in Prometheus' format. Label values come from routes and known models alone, so that
no client can make the number of series grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.engine import Usage
from services.discovery import ReplicaEndpoint
from services.expert_counts import ModelExperts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One registry per endpoint process."""

    def __init__(
        self, replicas: Callable[[], Sequence[ReplicaEndpoint]], experts: Callable[[], Sequence[ModelExperts]]
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Replicas(replicas))
        self._registry.register(_Experts(experts))
        self._requests = Counter(
            "windfarm_requests", "Finished requests", ("route", "method", "status", "model"), registry=self._registry
        )
        self._duration = Histogram(
            "windfarm_request_seconds", "Request to last byte", ("route",), buckets=_SECONDS, registry=self._registry
        )
        self._first_token = Histogram(
            "windfarm_first_token_seconds",
            "Request to the first token of a streamed answer",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "windfarm_tokens", "Tokens of finished answers", ("model", "kind"), registry=self._registry
        )
        self._limit_refusals = Counter(
            "windfarm_limit_refusals",
            "Requests that met a limit of their api key; unavailable: nobody could check them",
            ("reason",),
            registry=self._registry,
        )
        self._streams_moved = Counter(
            "windfarm_streams_moved", "Answers that went on at another replica", ("model",), registry=self._registry
        )
        self._in_flight = Gauge("windfarm_requests_in_flight", "Requests that run now", registry=self._registry)
        tasks = Gauge("windfarm_tasks", "Tasks on the event loop of this endpoint process", registry=self._registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))

    def began(self) -> None:
        self._in_flight.inc()

    def ended(self, route: str, method: str, status: int, model: str, duration_s: float) -> None:
        self._in_flight.dec()
        self._requests.labels(route, method, str(status), model).inc()
        self._duration.labels(route).observe(duration_s)

    def first_token(self, model: str, seconds: float) -> None:
        self._first_token.labels(model).observe(seconds)

    def tokens(self, model: str, usage: Usage) -> None:
        self._tokens.labels(model, "prompt").inc(usage.num_prompt_tokens)
        self._tokens.labels(model, "completion").inc(usage.num_completion_tokens)

    def stream_moved(self, model: str) -> None:
        self._streams_moved.labels(model).inc()

    def limit_refused(self, reason: str) -> None:
        self._limit_refusals.labels(reason).inc()

    def watch_queues(self, sizes: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """`sizes` tells of each model how many requests run and how many wait."""
        self._registry.register(_Queues(sizes))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Replicas(Collector):
    """The state of each announced replica at the moment of the scrape."""

    def __init__(self, replicas: Callable[[], Sequence[ReplicaEndpoint]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        labels = ("app", "model", "replica")
        up = GaugeMetricFamily("windfarm_replica_ready", "1: takes requests, 0: draining", labels=labels)
        running = GaugeMetricFamily("windfarm_replica_running", "Requests that a replica works on", labels=labels)
        queued = GaugeMetricFamily("windfarm_replica_queued", "Requests that wait in a replica", labels=labels)
        for replica in self._replicas():
            values = (replica.app, replica.model or "", replica.replica_id)
            up.add_metric(values, 1.0 if replica.state == "ready" else 0.0)
            running.add_metric(values, replica.running)
            queued.add_metric(values, replica.queued)
        return (up, running, queued)


class _Queues(Collector):
    """The waiting rooms of this process at the moment of the scrape."""

    def __init__(self, sizes: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        self._sizes = sizes

    def collect(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily(
            "windfarm_waiting", "Requests that wait for their turn at a model", labels=("model",)
        )
        for model, (_, num_waiting) in self._sizes().items():
            waiting.add_metric((model,), num_waiting)
        return (waiting,)


class _Experts(Collector):
    """Per rank of each gang, over all layers; the matrix of layers and experts is not for labels."""

    def __init__(self, experts: Callable[[], Sequence[ModelExperts]]) -> None:
        self._experts = experts

    def collect(self) -> Iterable[Metric]:
        computed = CounterMetricFamily(
            "windfarm_expert_rank_tokens",
            "Pairs of token and expert that fell to the experts of a rank, all layers together",
            labels=("model", "gang", "rank"),
        )
        mean = GaugeMetricFamily(
            "windfarm_expert_imbalance", "Busiest rank / mean rank, mean of the layers", labels=("model", "gang")
        )
        worst = GaugeMetricFamily(
            "windfarm_expert_imbalance_worst", "Busiest rank / mean rank, worst layer", labels=("model", "gang")
        )
        for experts in self._experts():
            for gang in experts.gangs:
                for rank, tokens in enumerate(gang.load.rank_tokens().sum(axis=0).tolist()):
                    computed.add_metric((experts.model, gang.name, str(rank)), tokens)
                imbalance = gang.load.imbalance()
                if not len(imbalance):  # vLLM moves the experts between the ranks
                    continue
                mean.add_metric((experts.model, gang.name), float(imbalance.mean()))
                worst.add_metric((experts.model, gang.name), float(imbalance.max()))
        return (computed, mean, worst)

"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from anychip.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "anychip_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("anychip_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.answer_tokens = Counter("anychip_answer_tokens", "Tokens of answers.", registry=self.registry)
        self.first_token = Histogram(
            "anychip_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "anychip_answer_seconds",
            "From a request to the end of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._gauge("anychip_running", "Answers in the engine.").set_function(lambda: len(worker.batch.running))
        self._gauge("anychip_waiting", "Answers waiting.").set_function(lambda: len(worker.batch.waiting))
        self._gauge("anychip_reused_tokens", "Tokens of prompts that were not read again.").set_function(
            lambda: worker.batch.slots.reused_tokens
        )

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)

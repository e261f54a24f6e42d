"""The figures of a server, for Prometheus."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_TOGETHER = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Metrics:
    """Counts from its making on; each server has its own."""

    def __init__(self):
        self._registry = CollectorRegistry()
        make = lambda kind, name, text, *labels, **more: kind(f"irg_{name}", text, labels,
                                                              registry=self._registry, **more)
        self._requests = make(Counter, "requests_total", "Requests that were answered", "route", "status")
        self._seconds = make(Histogram, "request_seconds", "From a request to its whole answer", "route",
                             buckets=_SECONDS)
        self._step_seconds = make(Histogram, "step_seconds", "A step of a batch of trajectories", "step",
                                  buckets=_SECONDS)
        self._together = make(Histogram, "step_trajectories", "Trajectories that took a step together", "step",
                              buckets=_TOGETHER)
        self._waiting = make(Gauge, "waiting_trajectories", "Accepted, and not begun")
        self._active = make(Gauge, "active_trajectories", "Begun, their contexts in memory")

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def took_step(self, name: str, seconds: float, together: int) -> None:
        self._step_seconds.labels(name).observe(seconds)
        self._together.labels(name).observe(together)

    def has_queue(self, waiting: int, active: int) -> None:
        self._waiting.set(waiting)
        self._active.set(active)

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

"""A run is asked to stop by a signal; it saves and ends."""

import contextlib
import signal
from collections.abc import Iterator

from jax.experimental import multihost_utils

from irg_jax.parallel.hosts import Hosts


class Interrupt:
    """Whether SIGTERM or SIGINT came, to this host or another: the loop then saves and ends.

    Among several hosts, SIGTERM is left to JAX's coordination service, which tells them all and chooses a call
    of `reached` that none of them has passed. One object serves all stages of a run, so that a signal at the
    end of one is not lost.
    """

    def __init__(self, hosts: Hosts):
        self._several, self._set, self._calls = hosts.count > 1, False, 0

    def reached(self) -> bool:
        """To be asked before every step and after a stage, by all hosts equally often."""
        # Not the step: the service counts from 0, and would wait for ever for one that a resumed run passed.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls) if self._several else self._set

    @contextlib.contextmanager
    def listen(self) -> Iterator["Interrupt"]:
        def handler(number, frame):
            if self._several:
                signal.raise_signal(signal.SIGTERM)
            self._set = True
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, handler) for number in numbers}
        try:
            yield self
        finally:
            for number, old in before.items():
                signal.signal(number, old)

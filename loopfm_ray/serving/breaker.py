"""A circuit breaker: a store that does not answer is left alone for a while, so that not every request waits for it."""

import threading
from collections.abc import Callable

__all__ = ["Breaker"]


class Breaker:
    """Lets calls through until `max_failures` in a row have failed; then none for `open_s`, then one at a time to try.

    Threads may share it. Source: M. Nygard, Release It!, "Circuit Breaker".
    """

    def __init__(
        self, clock: Callable[[], float], max_failures: int = 3, open_s: float = 1.0
    ) -> None:
        """Begin closed.

        Args:
            clock: seconds that only rise.
            max_failures: failures in a row that open it.
            open_s: how long no call is let through.
        """
        self._clock, self._max_failures, self._open_s = clock, max_failures, open_s
        self._lock = threading.Lock()
        self._failures = 0
        self._retry_at = 0.0
        self.num_opened = 0
        """How often it opened."""

    @property
    def is_open(self) -> bool:
        """Whether calls are held back."""
        return self._failures >= self._max_failures

    def allows(self) -> bool:
        """Return whether a call may be made; whoever makes it tells how it went."""
        if not self.is_open:
            return True
        with self._lock:
            now = self._clock()
            if not self.is_open or now < self._retry_at:
                return not self.is_open
            # the next one waits as long again, whether this one tells or not
            self._retry_at = now + self._open_s
            return True

    def succeeded(self) -> None:
        """Tell that a call was answered."""
        if self._failures:
            with self._lock:
                self._failures = 0

    def failed(self) -> None:
        """Tell that a call was not answered."""
        with self._lock:
            self._failures += 1
            if self._failures >= self._max_failures:
                self.num_opened += self._failures == self._max_failures
                self._retry_at = self._clock() + self._open_s

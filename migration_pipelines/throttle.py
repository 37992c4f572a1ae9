"""How many requests and bytes a second a store may be sent, over all threads and stores of one address."""

from __future__ import annotations

import threading
import time


class Throttle:
    """Spaces out what is asked of it, so that no second carries more than `per_second`.

    There are no bursts: a service that counts in shorter windows than a second is kept within its limit too.

    Parameters
    ----------
    per_second
        How much a second may carry, in whatever unit `wait` is called with.
    """

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, amount: float = 1.0) -> None:
        """Wait until `amount` more may be sent."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + amount / self._per_second
        if start > now:
            time.sleep(start - now)


_THROTTLES: dict[tuple[str, str, float], Throttle] = {}
_LOCK = threading.Lock()


def shared_throttle(address: str, unit: str, per_second: float) -> Throttle:
    """Return the one throttle of an address: all workers of a process share a store's limit."""
    with _LOCK:
        return _THROTTLES.setdefault((address, unit, per_second), Throttle(per_second))

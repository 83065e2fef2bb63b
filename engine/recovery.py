"""What happens after a worker was lost or a group member failed.

    HEALTHY ──(worker lost, member failed)──▶ DRAINING ──(nothing in flight)──▶ RESETTING ──(all reset)──▶ HEALTHY

DRAINING: every member of a hit request's commands has its abort word set, so nobody waits for one that will not come.
An abort may also stop a command of another request queued on the same device; that request is then hit as well.
RESETTING: all surviving workers are idle; each zeroes its barrier counters and abort word. Only then are new commands
given out, so no late store or count of an aborted chunk can meet a new one. Hit requests start again from their
prompt; after `MAX_ATTEMPTS` they fail.
"""

import enum

from tetrion.engine.inflight import InFlightTable
from tetrion.engine.request_table import Request, RequestTable

MAX_ATTEMPTS = 3


class RecoveryState(enum.Enum):
    HEALTHY = "healthy"
    DRAINING = "draining"
    RESETTING = "resetting"


class Recovery:
    def __init__(self, table: RequestTable, in_flight: InFlightTable) -> None:
        self._table = table
        self._in_flight = in_flight
        self._hit: dict[str, str] = {}
        self._unacknowledged: set[int] = set()
        self.state = RecoveryState.HEALTHY

    @property
    def healthy(self) -> bool:
        return self.state is RecoveryState.HEALTHY

    def hit(self, request_id: str, reason: str) -> None:
        """The request's state is lost or in doubt; from now on drain."""
        self._hit.setdefault(request_id, reason)
        self.state = RecoveryState.DRAINING

    def is_hit(self, request_id: str) -> bool:
        return request_id in self._hit

    def devices_to_abort(self) -> set[int]:
        """Devices that may wait inside a hit request's command."""
        return {
            member for entry in self._in_flight if entry.command.request_id in self._hit for member in entry.pending
        }

    def drained(self) -> bool:
        return self.state is RecoveryState.DRAINING and len(self._in_flight) == 0

    def start_reset(self, device_ids: frozenset[int]) -> None:
        self._unacknowledged = set(device_ids)
        self.state = RecoveryState.RESETTING

    def acknowledge(self, device_id: int) -> None:
        """The device has reset, or is gone."""
        self._unacknowledged.discard(device_id)

    def finish(self) -> list[tuple[Request, str]]:
        """When all have acknowledged: back to HEALTHY; returns the requests to start again, with the reason."""
        if self.state is not RecoveryState.RESETTING or self._unacknowledged:
            return []
        self.state = RecoveryState.HEALTHY
        hit, self._hit = self._hit, {}
        return [(request, reason) for request_id, reason in hit.items() if (request := self._table.get(request_id))]

"""How much device time each tenant has had, so that requests without a deadline take turns by tenant, not by arrival.

Start-time fair queueing (Goyal et al., SIGCOMM 1996) over device seconds: a tenant's clock goes on with what it is
given, divided by its weight. One that has had nothing to do begins again with the clock of the one that has had least,
so that nobody saves anything up, and nobody pays for having used what was idle.
"""

from collections.abc import Collection, Mapping


class DeviceShares:
    """`weights`: of tenants, where they are not 1."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._clocks: dict[str, float] = {}
        """Of the tenants that have something to do."""

    def are(self, tenants: Collection[str]) -> bool:
        """These have something to do. Returns whether they are several."""
        if tenants != self._clocks.keys():
            least_s = min((clock for tenant, clock in self._clocks.items() if tenant in tenants), default=0.0)
            self._clocks = {tenant: self._clocks.get(tenant, least_s) for tenant in tenants}
        return len(tenants) > 1

    def ran(self, tenant: str, device_s: float) -> None:
        if tenant in self._clocks:
            self._clocks[tenant] += device_s / self._weights.get(tenant, 1.0)

    def lead_s(self, tenant: str) -> float:
        """Device seconds by which it is ahead of the tenant that has had least."""
        least_s = min(self._clocks.values(), default=0.0)
        return self._clocks.get(tenant, least_s) - least_s

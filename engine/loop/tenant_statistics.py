"""What each tenant has had: deadlines met and missed, requests refused, device seconds.

As many tenants may come as there are addresses, so only the `MAX_TENANTS` that have had most device time are told
apart. Where another comes, the one that has had least is counted among the others from then on: sums of `OTHERS` never
fall, and a tenant that comes back begins at 0.
"""

import msgspec

MAX_TENANTS = 24
OTHERS = "other:"
"""No tenant's name, as it would be an address of no known kind (see entrypoints/http/tenants.py)."""


class TenantFigures(msgspec.Struct, kw_only=True):
    """Requests whose deadline was met; those with one that it was not, for whatever reason, but that they were given up
    by the caller before it; those that were not accepted, with a deadline or without. `device_s`: time of devices at
    their commands, lost attempts included."""

    num_met: int = 0
    num_missed: int = 0
    num_refused: int = 0
    device_s: float = 0.0

    def add(self, other: "TenantFigures") -> None:
        for field in self.__struct_fields__:
            setattr(self, field, getattr(self, field) + getattr(other, field))


class TenantStatistics:
    def __init__(self, max_tenants: int = MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._figures: dict[str, TenantFigures] = {}
        self._others = TenantFigures()

    def figures(self) -> dict[str, TenantFigures]:
        """A copy, by tenant; those that are not told apart under `OTHERS`, if there are any."""
        others = {OTHERS: self._others} if self._others != TenantFigures() else {}
        return {name: msgspec.structs.replace(figures) for name, figures in (self._figures | others).items()}

    def ran(self, tenant: str, device_s: float) -> None:
        self._of(tenant).device_s += device_s

    def ended(self, tenant: str, is_met: bool) -> None:
        """A request with a deadline has ended."""
        figures = self._of(tenant)
        figures.num_met += is_met
        figures.num_missed += not is_met

    def refused(self, tenant: str) -> None:
        self._of(tenant).num_refused += 1

    def _of(self, tenant: str) -> TenantFigures:
        figures = self._figures.get(tenant)
        if figures is None:
            if len(self._figures) == self._max_tenants:
                least = min(self._figures, key=lambda name: self._figures[name].device_s)
                self._others.add(self._figures.pop(least))
            figures = self._figures[tenant] = TenantFigures()
        return figures

"""Whose turn it is, by the device time that tenants, and the users of each, have had lately.

Everybody's *share* of what was used lately is an equal part by weight among those that have something to do. Who has
had no more than that comes first, whoever has had more comes behind, the more the later; among those that have had
about as much, deadlines decide. Shares bind nobody while nobody else wants the devices.

What somebody has had fades within `MEMORY_S`, so that using what was idle is paid for briefly if at all; and one that
comes back after a pause is taken for having had nearly as much as the one that has had least, so that nobody saves up.
"""

import math
from collections.abc import Collection, Mapping

from tetrion.engine.planning.snapshot import Holder

MEMORY_S = 30.0
"""Time constant of what fades."""
BURST_S = 1.0
"""Who has had so long all devices more than its share, or than another, is behind."""
CREDIT = 0.2
"""Of all devices: so much less than the least somebody may seem to have had after a pause."""
MANY = 64
"""So many that have nothing to do may be remembered, beside as many as there are that have."""
MIN_USE = 1e-6
"""In devices: somebody who has had less and has nothing to do is forgotten."""


class _Use:
    """Devices in use, averaged over the last while."""

    __slots__ = ("_devices", "_time_s")

    def __init__(self) -> None:
        self._devices, self._time_s = 0.0, 0.0

    def at(self, now_s: float) -> float:
        return self._devices * math.exp((self._time_s - now_s) / MEMORY_S) if self._devices else 0.0

    def set(self, devices: float, now_s: float) -> None:
        self._devices, self._time_s = devices, now_s


class _Peers:
    """Those among whom something is divided."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}
        self._sweep_at = MANY
        """With more of them those that have had next to nothing are looked for."""
        self._active: Collection[str] = ()

    def ran(self, name: str, device_s: float, now_s: float) -> None:
        use = self._uses.setdefault(name, _Use())
        use.set(use.at(now_s) + device_s / MEMORY_S, now_s)

    def resume(self, active: Collection[str], credit: float, now_s: float) -> None:
        """These have something to do from now on. `credit`: devices by which a newcomer may be behind the others."""
        if self._active == active:
            return
        stayed = [self._uses[name].at(now_s) for name in self._active if name in active]
        least = min(stayed, default=0.0) - credit
        for name in active:
            use = self._uses.setdefault(name, _Use())
            if name not in self._active and use.at(now_s) < least:
                use.set(least, now_s)
        self._active = active
        if len(self._uses) > self._sweep_at:
            kept = {n: use for n, use in self._uses.items() if n in active or use.at(now_s) >= MIN_USE}
            self._uses, self._sweep_at = kept, 2 * len(kept) + MANY

    def ranks(self, weights: Mapping[str, float], burst: float, now_s: float) -> dict[str, int]:
        """Of those with these weights. `burst`: devices that make a difference."""
        mean = sum(weights.values()) / len(weights)
        order = sorted((self._uses[name].at(now_s) * mean / weight, name) for name, weight in weights.items())
        share = sum(self._uses[name].at(now_s) for name in weights) / len(weights)
        ranks, rank, bound = {}, 0, max(share, order[0][0]) + burst
        for devices, name in order:
            if devices > bound:
                rank, bound = rank + 1, devices + burst
            ranks[name] = rank
        return ranks


class DeviceShares:
    """`weights`: of tenants, where they are not 1. Users of one tenant weigh the same."""

    def __init__(self, num_devices: int, weights: Mapping[str, float]) -> None:
        self._num_devices = num_devices
        self._weights = weights
        self._tenants = _Peers()
        self._users: dict[str, _Peers] = {}

    def ran(self, holder: Holder, device_s: float, now_s: float) -> None:
        """It was given so much device time."""
        tenant, user = holder
        self._tenants.ran(tenant, device_s, now_s)
        self._users.setdefault(tenant, _Peers()).ran(user, device_s, now_s)

    def ranks(self, active: Collection[Holder], now_s: float) -> Mapping[Holder, int]:
        """Who comes first of those that have something to do: those of rank 0, then 1, …; empty if all are equal."""
        users: dict[str, set[str]] = {}
        for tenant, user in active:
            users.setdefault(tenant, set()).add(user)
        credit = CREDIT * self._num_devices
        self._tenants.resume(users.keys(), credit, now_s)
        for tenant, names in users.items():
            self._users.setdefault(tenant, _Peers()).resume(names, credit, now_s)
        if len(self._users) > 2 * len(users) + MANY:
            self._users = {tenant: peers for tenant, peers in self._users.items() if tenant in users}
        if len(active) < 2:
            return {}
        burst = self._num_devices * BURST_S / MEMORY_S
        by_tenant = self._tenants.ranks({t: self._weights.get(t, 1.0) for t in users}, burst, now_s)
        places: dict[Holder, tuple[int, int]] = {}
        for tenant, names in users.items():
            by_user = self._users[tenant].ranks(dict.fromkeys(names, 1.0), burst, now_s)
            places |= {(tenant, user): (by_tenant[tenant], rank) for user, rank in by_user.items()}
        order = {place: i for i, place in enumerate(sorted(set(places.values())))}
        return {holder: order[place] for holder, place in places.items()} if len(order) > 1 else {}

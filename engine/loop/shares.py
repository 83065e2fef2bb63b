"""Who is next: state slots and places in the queue, shared by tenants, and by the users of each.

Of those that wait a slot goes to the tenant that holds fewest, of equals to the one that got its last slot earliest;
within it likewise to a user, within that to the first by the request's own rank. So a lone tenant may take all, of
several none gets a slot that one with fewer waits for, and a long queue is not ahead of a short one.

A tenant's *share* is what it would hold if all slots were dealt out one at a time in that way, each tenant stopping at
what it wants (max-min fairness), without what does not come out even, and at least one.

Requests wait in lanes (`Lane`), of which who asks for the next one names those that may have a slot. A request may
change its lane; its rank changes with it.

Every operation costs O(log n) of what waits, but `share`: it looks at all tenants where they are fewer than the slots.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

Rank = tuple[Any, ...]


class Lane(NamedTuple):
    """`is_feasible`: it can still meet its deadline. `is_patient`: it may be kept waiting for long."""

    is_feasible: bool
    is_patient: bool


LANES = tuple(Lane(feasible, patient) for feasible in (True, False) for patient in (False, True))


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A request to those that share: whose it is, its lane, and its rank within its user, which is like that of no
    other."""

    request_id: str
    tenant: str
    user: str
    rank: Rank
    lane: Lane


class Ranking:
    """Names in the order of their ranks, which may change."""

    def __init__(self) -> None:
        self._ranks: dict[str, Rank] = {}
        self._entries: list[tuple[Rank, str]] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def put(self, name: str, rank: Rank | None) -> None:
        """Give `name` this rank instead of its own; None: take it out."""
        known = self._ranks.get(name)
        if known == rank:
            return
        if known is not None:
            del self._entries[bisect_left(self._entries, (known, name))]
            del self._ranks[name]
        if rank is not None:
            self._ranks[name] = rank
            insort(self._entries, (rank, name))

    def first(self) -> tuple[Rank, str] | None:
        return self._entries[0] if self._entries else None

    def last(self) -> tuple[Rank, str] | None:
        return self._entries[-1] if self._entries else None


class _User:
    def __init__(self) -> None:
        self.num_held = self.turn = 0
        self.lanes = {lane: Ranking() for lane in LANES}
        """Requests by their own rank."""


class _Tenant:
    def __init__(self) -> None:
        self.num_held = self.turn = 0
        self.num_waiting = 0
        self.users: dict[str, _User] = {}
        self.lanes = {lane: Ranking() for lane in LANES}
        """Users with a request that waits, by (slots held, turn, rank of the first one)."""
        self.new: dict[str, None] = {}
        """Those that wait and have never held a slot, in order of arrival."""


class Shares:
    """Requests that wait for a slot, and how many slots each tenant and user holds."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._tenants: dict[str, _Tenant] = {}
        self._lanes = {lane: Ranking() for lane in LANES}
        """Tenants with a request that waits, by (slots held, turn, rank of the first user)."""
        self._sizes = Ranking()
        """Tenants by how many of their requests wait."""
        self._waiting: set[str] = set()
        self._num_turns = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # What happens to a request ------------------------------------------------------------------------------------

    def wait(self, claim: Claim, is_new: bool) -> None:
        """It waits for a slot. `is_new`: it has not held one before."""
        tenant, user = self._tenant_and_user(claim)
        self._waiting.add(claim.request_id)
        user.lanes[claim.lane].put(claim.request_id, claim.rank)
        tenant.num_waiting += 1
        if is_new:
            tenant.new[claim.request_id] = None
        self._update(claim, tenant, user)

    def leave(self, claim: Claim) -> None:
        """It waits no more, if it did."""
        if claim.request_id in self._waiting:
            self._waiting.remove(claim.request_id)
            tenant, user = self._tenant_and_user(claim)
            user.lanes[claim.lane].put(claim.request_id, None)
            tenant.num_waiting -= 1
            tenant.new.pop(claim.request_id, None)
            self._update(claim, tenant, user)

    def change(self, before: Claim, claim: Claim) -> None:
        """It waits with another claim, if it waits; its tenant and user stay."""
        if claim.request_id in self._waiting:
            tenant, user = self._tenant_and_user(claim)
            user.lanes[before.lane].put(claim.request_id, None)
            user.lanes[claim.lane].put(claim.request_id, claim.rank)
            self._update(claim, tenant, user)

    def hold(self, claim: Claim) -> None:
        """It has got a slot, and waits no more."""
        self.leave(claim)
        tenant, user = self._tenant_and_user(claim)
        self._num_turns += 1
        tenant.turn = user.turn = self._num_turns
        self._add_held(claim, 1)

    def release(self, claim: Claim) -> None:
        """Its slot is free again."""
        self._add_held(claim, -1)

    # Questions ----------------------------------------------------------------------------------------------------

    def next(self, lanes: Iterable[Lane] = LANES) -> str | None:
        """Who of these lanes gets the next slot."""
        tops = [(top, lane) for lane in lanes if (top := self._lanes[lane].first()) is not None]
        if not tops:
            return None
        (_, tenant_name), lane = min(tops)
        tenant = self._tenants[tenant_name]
        user = tenant.users[_first_name(tenant.lanes[lane])]
        return _first_name(user.lanes[lane])

    def num_held(self, tenant: str, user: str) -> tuple[int, int]:
        """Slots of the tenant, and of its user."""
        found = self._tenants.get(tenant) or _Tenant()
        return found.num_held, (found.users.get(user) or _User()).num_held

    def share(self) -> int:
        """Slots of a tenant that wants no fewer."""
        num_left, num_tenants = self._num_slots, len(self._tenants)
        if num_tenants >= num_left:
            return 1
        for num_wanted in sorted(tenant.num_held + tenant.num_waiting for tenant in self._tenants.values()):
            if num_wanted * num_tenants > num_left:
                return num_left // num_tenants
            num_left, num_tenants = num_left - num_wanted, num_tenants - 1
        return self._num_slots

    def to_displace(self, newcomer: Claim) -> str | None:
        """Who leaves a full queue for the newcomer: the newest of the tenant that has most in it, if the newcomer's
        will then still not have more. Who has held a slot stays."""
        largest = self._sizes.last()
        if largest is None:
            return None
        tenant, own = self._tenants[largest[1]], self._tenants.get(newcomer.tenant) or _Tenant()
        return next(reversed(tenant.new), None) if tenant.num_waiting >= own.num_waiting + 2 else None

    # Its parts ----------------------------------------------------------------------------------------------------

    def _tenant_and_user(self, claim: Claim) -> tuple[_Tenant, _User]:
        tenant = self._tenants.setdefault(claim.tenant, _Tenant())
        return tenant, tenant.users.setdefault(claim.user, _User())

    def _add_held(self, claim: Claim, more: int) -> None:
        tenant, user = self._tenant_and_user(claim)
        tenant.num_held += more
        user.num_held += more
        self._update(claim, tenant, user)

    def _update(self, claim: Claim, tenant: _Tenant, user: _User) -> None:
        """Ranks follow from what has changed; who has nothing any more is forgotten."""
        for lane in LANES:
            tenant.lanes[lane].put(claim.user, _rank_above(user, user.lanes[lane]))
            self._lanes[lane].put(claim.tenant, _rank_above(tenant, tenant.lanes[lane]))
        self._sizes.put(claim.tenant, (tenant.num_waiting,) if tenant.num_waiting else None)
        if not (user.num_held or any(user.lanes.values())):
            del tenant.users[claim.user]
        if not tenant.users:
            del self._tenants[claim.tenant]


def _rank_above(one: _Tenant | _User, below: Ranking) -> Rank | None:
    """Of a tenant or user by what is below it; None if nothing is."""
    first = below.first()
    return None if first is None else (one.num_held, one.turn, *first[0])


def _first_name(ranking: Ranking) -> str:
    first = ranking.first()
    assert first is not None
    return first[1]

"""Sharing of slots and of the queue, against a model that knows nothing but lists."""

from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrion.engine.loop.shares import LANES, Claim, Lane, Ranking, Shares


def make_claim(number: int, tenant: str = "a", user: str = "", due: int = 0, lane: Lane = LANES[0]) -> Claim:
    return Claim(request_id=f"r{number}", tenant=tenant, user=user, rank=(due, f"r{number}"), lane=lane)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.tuples(st.integers(0, 3)))))
def test_a_ranking_is_in_order_whatever_changes(changes: list[tuple[str, tuple[int] | None]]) -> None:
    ranking, model = Ranking(), {}
    for name, rank in changes:
        ranking.put(name, rank)
        model.pop(name, None)
        if rank is not None:
            model[name] = rank
        expected = sorted((rank, name) for name, rank in model.items())
        assert (ranking.first(), ranking.last()) == ((expected[0], expected[-1]) if expected else (None, None))
        assert bool(ranking) == bool(expected)


class Model:
    """What `shares.py` says, in as many words."""

    def __init__(self) -> None:
        self.waiting: list[Claim] = []
        self.holding: list[Claim] = []
        self.new: list[Claim] = []
        self.got: list[Claim] = []
        """A slot, in this order, while its user had anything."""

    def next(self, lanes: tuple[Lane, ...]) -> str | None:
        tenants, users = Counter(c.tenant for c in self.holding), Counter((c.tenant, c.user) for c in self.holding)
        candidates = [claim for claim in self.waiting if claim.lane in lanes]
        order = [
            (
                (tenants[c.tenant], self._turn((c.tenant,))),
                (users[c.tenant, c.user], self._turn((c.tenant, c.user))),
                (c.rank, c.request_id),
            )
            for c in candidates
        ]
        return min(order)[-1][-1] if order else None

    def _turn(self, whose: tuple[str, ...]) -> int:
        """When it got its last slot, -1 if it has had none since it came."""
        turns = [i for i, claim in enumerate(self.got) if (claim.tenant, claim.user)[: len(whose)] == whose]
        return max(turns, default=-1)

    def forget(self) -> None:
        """Who has nothing any more is as if it had never come."""
        there = self.waiting + self.holding
        users = {(claim.tenant, claim.user) for claim in there}
        tenants = {claim.tenant for claim in there}
        self.got = [
            claim if (claim.tenant, claim.user) in users else msgspec.structs.replace(claim, user="gone")
            for claim in self.got
            if claim.tenant in tenants
        ]

    def share(self, num_slots: int) -> int:
        """Deal slots out one at a time, in turns that all can take part in who want more."""
        wanted = Counter(claim.tenant for claim in self.waiting + self.holding)
        dealt, num_left = Counter[str](), num_slots
        while hungry := [tenant for tenant in wanted if dealt[tenant] < wanted[tenant]]:
            if len(hungry) > num_left:
                return max([1, *dealt.values()])
            dealt.update(hungry)
            num_left -= len(hungry)
        return max(wanted.values(), default=1)

    def to_displace(self, newcomer: Claim) -> str | None:
        sizes = Counter(claim.tenant for claim in self.waiting)
        if not sizes:
            return None
        largest = max(sizes, key=lambda tenant: (sizes[tenant], tenant))
        displaceable = [claim for claim in self.new if claim.tenant == largest]
        can_be = displaceable and sizes[largest] - 1 >= sizes[newcomer.tenant] + 1
        return displaceable[-1].request_id if can_be else None


@settings(deadline=None)
@given(st.data())
def test_slots_and_places_go_to_who_has_fewest(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 12))
    shares, model = Shares(num_slots), Model()
    for number in range(data.draw(st.integers(1, 40))):
        claim = make_claim(
            number,
            data.draw(st.sampled_from("abcd")),
            data.draw(st.sampled_from(("", "u", "v"))),
            data.draw(st.integers(0, 3)),
            data.draw(st.sampled_from(LANES)),
        )
        assert shares.to_displace(claim) == model.to_displace(claim)
        is_new = data.draw(st.booleans())
        shares.wait(claim, is_new)
        model.waiting.append(claim)
        model.new += [claim] * is_new
        what = data.draw(st.sampled_from(("nothing", "hold", "hold", "leave", "release", "change")))
        if what == "release" and model.holding:
            shares.release(model.holding.pop(data.draw(st.integers(0, len(model.holding) - 1))))
        elif what in ("hold", "leave") and model.waiting and len(model.holding) < num_slots:
            moved = model.waiting.pop(data.draw(st.integers(0, len(model.waiting) - 1)))
            model.new = [claim for claim in model.new if claim != moved]
            if what == "hold":
                model.holding.append(moved)
                model.got.append(moved)
                shares.hold(moved)
            else:
                shares.leave(moved)
        elif what == "change" and model.waiting:
            i = data.draw(st.integers(0, len(model.waiting) - 1))
            before, lane = model.waiting[i], data.draw(st.sampled_from(LANES))
            after = msgspec.structs.replace(before, lane=lane, rank=(data.draw(st.integers(0, 3)), before.request_id))
            shares.change(before, after)
            model.waiting[i] = after
            model.new = [after if claim == before else claim for claim in model.new]
        model.forget()
        for lanes in (LANES, LANES[:2], LANES[2:], LANES[::2]):
            assert shares.next(lanes) == model.next(lanes)
        assert shares.num_waiting == len(model.waiting)
        most = max(Counter(claim.tenant for claim in model.waiting + model.holding).values(), default=1)
        assert min(shares.share(), most) == model.share(num_slots)
    for claim in model.holding:
        shares.release(claim)
    for claim in model.waiting:
        shares.leave(claim)
    assert not shares._tenants, "who has nothing is forgotten"


def test_tenants_with_equally_many_slots_go_by_the_requests_own_rank() -> None:
    shares = Shares(4)
    for claim in (make_claim(0, "a", due=2), make_claim(1, "b", due=1), make_claim(2, "c", due=3)):
        shares.wait(claim, is_new=True)
    assert shares.next() == "r1"


def test_tenants_with_equally_many_slots_take_turns_whatever_is_in_their_queues() -> None:
    shares = Shares(1)
    for number in range(4):
        shares.wait(make_claim(number, "hog", due=0), is_new=True)
    claims = {f"r{number}": make_claim(number, "hog", due=0) for number in range(4)}
    order = []
    for number in range(4, 7):
        claims[f"r{number}"] = make_claim(number, "other", due=9)
    while (name := shares.next()) is not None:
        shares.hold(claims[name])
        if name == "r0":
            for number in range(4, 7):
                shares.wait(claims[f"r{number}"], is_new=True)
        shares.release(claims[name])
        order.append(name)
    assert order == ["r0", "r4", "r1", "r5", "r2", "r6", "r3"]

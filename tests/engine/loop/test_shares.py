"""Sharing of slots and of the queue, against a model that knows nothing but lists."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.loop.shares import Claim, Ranking, Shares


def make_claim(number: int, tenant: str = "a", user: str = "", due: int = 0, is_patient: bool = False) -> Claim:
    return Claim(request_id=f"r{number}", tenant=tenant, user=user, rank=(due, f"r{number}"), is_patient=is_patient)


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

    def next(self, with_patient: bool) -> str | None:
        tenants, users = Counter(c.tenant for c in self.holding), Counter((c.tenant, c.user) for c in self.holding)
        candidates = [claim for claim in self.waiting if with_patient or not claim.is_patient]
        order = [(tenants[c.tenant], users[c.tenant, c.user], c.rank, c.request_id) for c in candidates]
        return min(order)[-1] if order else None

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
            data.draw(st.booleans()),
        )
        assert shares.to_displace(claim) == model.to_displace(claim)
        is_new = data.draw(st.booleans())
        shares.wait(claim, is_new)
        model.waiting.append(claim)
        model.new += [claim] * is_new
        what = data.draw(st.sampled_from(("nothing", "hold", "hold", "leave", "release")))
        if what == "release" and model.holding:
            shares.release(model.holding.pop(data.draw(st.integers(0, len(model.holding) - 1))))
        elif what in ("hold", "leave") and model.waiting and len(model.holding) < num_slots:
            moved = model.waiting.pop(data.draw(st.integers(0, len(model.waiting) - 1)))
            model.new = [claim for claim in model.new if claim != moved]
            if what == "hold":
                model.holding.append(moved)
                shares.hold(moved)
            else:
                shares.leave(moved)
        for with_patient in (True, False):
            assert shares.next(with_patient) == model.next(with_patient)
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
    assert shares.next(with_patient=True) == "r1"

"""Those that can still meet their deadline, against a model that knows nothing but a dictionary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrion.engine.loop.feasible import MAX_STALE, Feasible, Rank

TIMES = st.integers(0, 20).map(float)


@settings(deadline=None)
@given(st.data())
def test_order_work_and_who_turns_late_follow_from_what_was_put(data: st.DataObject) -> None:
    feasible, model, now_s = Feasible[str](), dict[Rank, tuple[float, float]](), 0.0
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(("put", "put", "again", "remove", "later")))
        if what == "put" or not model:
            rank = data.draw(TIMES), data.draw(st.integers(-1, 1)), f"r{len(model)}-{data.draw(TIMES)}"
        else:
            rank = data.draw(st.sampled_from(sorted(model)))
        if what == "later":
            now_s += data.draw(TIMES)
            expected = sorted((latest_s, rank) for rank, (latest_s, _) in model.items() if latest_s < now_s)
            assert list(feasible.take_late(now_s)) == [rank[2] for _, rank in expected]
            for _, late in expected:
                del model[late]
        elif what == "remove":
            feasible.remove(rank)
            model.pop(rank, None)
        else:
            model[rank] = data.draw(TIMES), data.draw(TIMES)
            feasible.put(rank, rank[2], *model[rank])
        assert len(feasible) == len(model)
        at = data.draw(TIMES), 0, "x"
        before, after = [r for r in sorted(model) if r < at], [r for r in sorted(model) if r >= at]
        things, work_s = feasible.around(at, 3, 2)
        assert things == [r[2] for r in before[-3:] + after[:2]]
        assert work_s == sum(model[r][1] for r in before[:-3])


def test_it_is_crowded_where_the_largest_would_make_another_late() -> None:
    feasible = Feasible[str]()
    for number in range(10):
        feasible.put((10.0 + number, 0, f"{number}"), "", 0.0, 2.0)

    def crowded_until_s(work_s: float, due_s: float = 5.0, weight: float = 1.0) -> float | None:
        return feasible.crowded_until_s((due_s, 0, "x"), 3, work_s, weight, now_s=0.0, num_devices=1)

    assert crowded_until_s(0.5) is None and crowded_until_s(3.0, weight=2.0) is None, "others are larger"
    assert crowded_until_s(2.0) == pytest.approx(22.0), "the last of the ten ends then, and is due at 19"
    assert crowded_until_s(2.0, due_s=30.0) is None, "nobody is behind it"
    feasible.put((12.5, 0, "large"), "", 0.0, 4.0)
    assert crowded_until_s(3.0) is None


def test_entries_that_do_not_hold_do_not_pile_up() -> None:
    feasible = Feasible[str]()
    for number in range(5000):
        feasible.put((1e6, 0, "only"), "", float(number), 1.0)
        feasible.put((float(number), 0, "gone"), "", 1e9, 1.0)
        feasible.remove((float(number), 0, "gone"))
    assert len(feasible) == 1 and len(feasible._heap) <= 2 + MAX_STALE

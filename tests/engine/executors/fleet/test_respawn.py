"""When a worker that died is started again: always, after ever longer pauses that a time of service forgives."""

from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.executors.fleet.respawn import LONGEST_PAUSE_S, LONGEST_REFUSED_PAUSE_S, SERVED_S, RespawnPolicy


def test_the_pauses_double_up_to_a_minute_and_nobody_is_given_up() -> None:
    policy = RespawnPolicy()
    assert [policy.died(0, float(time_s)) for time_s in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert policy.died(1, 16.0) == 0.5, "every worker has its own count"
    assert [policy.died(0, 1e6) for _ in range(2000)] == [60] * 2000


def test_ten_seconds_of_service_make_all_earlier_deaths_forgotten() -> None:
    policy = RespawnPolicy()
    policy.ready(0, 0.0)
    assert policy.died(0, 9.9) == 0.5
    policy.ready(0, 11.0)
    assert policy.died(0, 20.9) == 1, "9.9 seconds are too few"
    policy.ready(0, 23.0)
    assert policy.died(0, 33.0) == 0.5
    assert policy.died(0, 100.0) == 1, "it has not come up in between"


def test_a_process_there_was_no_room_for_is_tried_again_soon_and_is_no_death() -> None:
    policy = RespawnPolicy()
    assert [policy.refused(0) for _ in range(5)] == [0.5, 1, 2, 4, 4]
    assert policy.died(0, 50.0) == 0.5
    policy.ready(0, 51.0)
    assert policy.refused(0) == 0.5


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 30) | st.none())))
def test_pauses_never_exceed_a_minute_and_only_service_shortens_them(lives: list[tuple[float, float | None]]) -> None:
    """Each life: how long its start took, and how long it served, if it came up."""
    policy, now_s, previous_s = RespawnPolicy(), 0.0, 0.0
    for start_s, service_s in lives:
        now_s += start_s
        if service_s is not None:
            policy.ready(0, now_s)
        ready_s, now_s = now_s, now_s + (service_s or 0.0)
        pause_s = policy.died(0, now_s)
        has_served = service_s is not None and now_s - ready_s >= SERVED_S
        wanted_s = 0.5 if has_served or not previous_s else min(LONGEST_PAUSE_S, 2 * previous_s)
        assert pause_s == wanted_s
        assert 0 < policy.refused(0) <= LONGEST_REFUSED_PAUSE_S
        now_s, previous_s = now_s + pause_s, pause_s

"""When a worker that died is started again, and when no more."""

from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.fleet.respawn import MAX_DEATHS, RespawnPolicy
from tetrion.engine.recovery import MAX_ATTEMPTS


def test_the_pauses_grow_and_the_last_death_is_final() -> None:
    policy = RespawnPolicy(max_deaths=4, window_s=60.0, pause_s=1.0)
    assert [policy.died(0, time_s) for time_s in (10.0, 11.0, 13.0, 16.0)] == [0.0, 1.0, 2.0, None]
    assert policy.died(1, 16.0) == 0.0, "every worker has its own count"


def test_deaths_long_ago_do_not_count_if_the_worker_has_served_since() -> None:
    policy = RespawnPolicy(max_deaths=3, window_s=60.0)
    for number in range(20):
        assert policy.died(0, 100.0 * number) == 0.0
        policy.ready(0, 100.0 * number + 5.0)


def test_a_worker_that_never_comes_up_is_given_up_however_long_it_takes() -> None:
    policy = RespawnPolicy(max_deaths=3, window_s=60.0)
    policy.ready(0, 0.0)
    assert [policy.died(0, 100.0 * number) for number in (1, 2, 3)] == [0.0, 1.0, None]


@given(st.lists(st.floats(0, 1000), min_size=1).map(sorted))
def test_it_is_given_up_exactly_when_the_window_is_full(deaths_s: list[float]) -> None:
    policy = RespawnPolicy(max_deaths=3, window_s=60.0)
    for number, died_s in enumerate(deaths_s):
        recent = sum(earlier_s >= died_s - 60.0 for earlier_s in deaths_s[: number + 1])
        assert (policy.died(0, died_s) is None) == (recent >= 3)
        policy.ready(0, died_s)


def test_one_request_cannot_use_up_a_worker() -> None:
    assert MAX_DEATHS > MAX_ATTEMPTS

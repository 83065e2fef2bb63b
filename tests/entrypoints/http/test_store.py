"""The store keeps its two promises: bounded bytes, and no picture dropped within the hour."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tetrion.entrypoints.http.store import RESERVATION_WAIT_S, PictureStore, StoreFull


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def put(store: PictureStore, num_bytes: int) -> str:
    with store.reserve(num_bytes) as reservation:
        return store.put(reservation, b"x" * num_bytes, "image/png", "png")


def test_a_picture_is_found_under_its_name_only() -> None:
    store = PictureStore(100)
    names = [put(store, 10), put(store, 20)]
    assert [len(store.get(name).data) for name in names] == [10, 20]  # type: ignore[union-attr]
    assert store.get("other.png") is None
    assert all(len(name) == 36 and name.endswith(".png") for name in names) and names[0] != names[1]


def test_old_pictures_stay_until_their_room_is_needed() -> None:
    clock = Clock()
    store = PictureStore(100, clock=clock)
    first, second = put(store, 50), put(store, 50)
    clock.now += 3600
    assert store.get(first) is not None
    third = put(store, 30)
    assert [store.get(name) is not None for name in (first, second, third)] == [False, True, True]


def test_a_full_store_refuses_and_says_how_long() -> None:
    clock = Clock()
    store = PictureStore(100, clock=clock)
    first = put(store, 60)
    clock.now += 600
    put(store, 40)
    with pytest.raises(StoreFull) as small:
        store.reserve(50)
    with pytest.raises(StoreFull) as large:
        store.reserve(61)
    assert (small.value.retry_after_s, large.value.retry_after_s) == (3000, 3600)
    assert store.get(first) is not None


def test_what_can_never_fit_is_told_apart() -> None:
    with pytest.raises(StoreFull) as error:
        PictureStore(100).reserve(101)
    assert error.value.retry_after_s is None


def test_reservations_count_and_come_back() -> None:
    store = PictureStore(100)
    with store.reserve(90) as reservation:
        with pytest.raises(StoreFull) as error:
            store.reserve(20)
        assert error.value.retry_after_s == RESERVATION_WAIT_S
        store.put(reservation, b"x" * 10, "image/png", "png")
    assert store.used_bytes == 10
    with pytest.raises(KeyError), store.reserve(50):
        raise KeyError
    assert store.used_bytes == 10


def test_more_than_reserved_is_an_error() -> None:
    store = PictureStore(100)
    with store.reserve(10) as reservation, pytest.raises(ValueError, match="11 bytes, but only 10"):
        store.put(reservation, b"x" * 11, "image/png", "png")


class StoreMachine(RuleBasedStateMachine):
    """Any order of putting, reserving, giving back and waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = PictureStore(1000, clock=self.clock)
        self.stored: list[tuple[str, float]] = []
        self.reservations: list = []

    @rule(num_bytes=st.integers(0, 400))
    def reserve(self, num_bytes: int) -> None:
        try:
            self.reservations.append(self.store.reserve(num_bytes))
        except StoreFull as full:
            assert self.store.used_bytes + num_bytes > 1000
            assert full.retry_after_s is not None and full.retry_after_s > 0

    @precondition(lambda self: self.reservations)
    @rule(share=st.floats(0, 1))
    def put(self, share: float) -> None:
        reservation = self.reservations[0]
        data = b"x" * int(share * reservation.num_bytes)
        self.stored.append((self.store.put(reservation, data, "image/png", "png"), self.clock.now))

    @precondition(lambda self: self.reservations)
    @rule()
    def give_back(self) -> None:
        self.store.release(self.reservations.pop(0))

    @rule(seconds=st.floats(0, 4000))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def bounded(self) -> None:
        assert 0 <= self.store.used_bytes <= 1000

    @invariant()
    def nothing_young_is_dropped(self) -> None:
        young = [name for name, stored_s in self.stored if self.clock.now - stored_s < 3600]
        assert all(self.store.get(name) is not None for name in young)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, deadline=None)

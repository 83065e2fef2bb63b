"""Finished pictures that clients fetch by URL: bounded in bytes, kept for at least an hour.

A picture is never dropped before `MIN_AGE_S`; after that it stays until its room is needed. So room must be promised
before drawing, or a picture could be drawn that nobody can fetch: `reserve` takes the most a picture can need, `put`
gives back what it did not. When even dropping every picture of age leaves too little room, `reserve` refuses and says
how long until it would not. All in memory: nothing remains on disk when the process ends.
"""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

MIN_AGE_S = 3600.0
RESERVATION_WAIT_S = 5.0
"""When to ask again while room is promised to pictures in the making: most of them will need far less of it."""


class StoredPicture(msgspec.Struct, frozen=True):
    data: bytes
    media_type: str
    stored_s: float


class StoreFull(Exception):
    """No room. `retry_after_s` is when there may be; None if `wanted_bytes` is more than the store can ever hold."""

    def __init__(self, wanted_bytes: int, capacity_bytes: int, retry_after_s: float | None) -> None:
        super().__init__(f"no room for {wanted_bytes} bytes in a picture store of {capacity_bytes} bytes")
        self.retry_after_s = retry_after_s


class Reservation:
    """Room for pictures that are being drawn. A context manager: what is left at its end is given back."""

    def __init__(self, store: "PictureStore", num_bytes: int) -> None:
        self._store = store
        self.num_bytes = num_bytes

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *exception: object) -> None:
        self._store.release(self)


class PictureStore:
    """Not thread-safe: one event loop owns it. `clock` gives monotonic seconds."""

    def __init__(
        self, capacity_bytes: int, min_age_s: float = MIN_AGE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes: must not be negative, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self._min_age_s = min_age_s
        self._clock = clock
        self._pictures: OrderedDict[str, StoredPicture] = OrderedDict()  # oldest first
        self._stored_bytes = 0
        self._reserved_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes stored or promised."""
        return self._stored_bytes + self._reserved_bytes

    def reserve(self, num_bytes: int) -> Reservation:
        """Promise room for `num_bytes`, dropping the oldest pictures of age if need be. Raises StoreFull."""
        if num_bytes > self.capacity_bytes:
            raise StoreFull(num_bytes, self.capacity_bytes, None)
        missing_bytes = self.used_bytes + num_bytes - self.capacity_bytes
        if missing_bytes > 0:
            wait_s = self._wait_s(missing_bytes)
            if wait_s > 0:
                raise StoreFull(num_bytes, self.capacity_bytes, wait_s)
            self._drop_oldest(missing_bytes)
        self._reserved_bytes += num_bytes
        return Reservation(self, num_bytes)

    def put(self, reservation: Reservation, data: bytes, media_type: str, extension: str) -> str:
        """Keep `data`, using up that much of `reservation`. Returns a name that cannot be guessed.

        Raises ValueError if the reservation was too small: the promise to others would be broken.
        """
        if len(data) > reservation.num_bytes:
            raise ValueError(f"a picture has {len(data)} bytes, but only {reservation.num_bytes} are reserved")
        reservation.num_bytes -= len(data)
        self._reserved_bytes -= len(data)
        self._stored_bytes += len(data)
        name = f"{secrets.token_urlsafe(24)}.{extension}"
        self._pictures[name] = StoredPicture(data, media_type, self._clock())
        return name

    def get(self, name: str) -> StoredPicture | None:
        return self._pictures.get(name)

    def release(self, reservation: Reservation) -> None:
        """Give back what is left of a reservation."""
        self._reserved_bytes -= reservation.num_bytes
        reservation.num_bytes = 0

    def _wait_s(self, missing_bytes: int) -> float:
        """Seconds until dropping pictures of age frees `missing_bytes` (0: now)."""
        for picture in self._pictures.values():
            missing_bytes -= len(picture.data)
            if missing_bytes <= 0:
                return max(0.0, picture.stored_s + self._min_age_s - self._clock())
        return RESERVATION_WAIT_S

    def _drop_oldest(self, num_bytes: int) -> None:
        while num_bytes > 0:
            _, picture = self._pictures.popitem(last=False)
            self._stored_bytes -= len(picture.data)
            num_bytes -= len(picture.data)

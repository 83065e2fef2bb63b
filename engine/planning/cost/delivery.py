"""What it costs to hand a finished picture on: to encode it, and to bring the bytes to a socket or a file.

A prediction by format and pixels, corrected by what was measured, as `correction.py` corrects cost tables: by format
and by size, within a factor of two. It knows no clock.
"""

import math

from tetrion.engine.planning.cost.correction import Mean, moved_mean
from tetrion.engine.request import Delivery

BASE_S = 0.001
S_PER_MEGAPIXEL: dict[Delivery, float] = {"png": 0.040, "jpeg": 0.010, "webp": 0.150}
"""One core of a server with photographs of 1024² (`benchmarks/results/delivery-cpu.json`): where a prediction starts
that a few pictures correct."""


class DeliveryModel:
    """Seconds from a finished picture to its last byte, waiting for an encoder included."""

    def __init__(self) -> None:
        self._means: dict[Delivery, dict[int, Mean]] = {}
        """By the power of two of pixels."""

    def predict_s(self, delivery: Delivery | None, pixels: int) -> float:
        """None: the picture is handed over as it is."""
        if delivery is None:
            return 0.0
        means, size = self._means.get(delivery, {}), pixels.bit_length()
        nearest = min(means, key=lambda known: (abs(known - size), known), default=None)
        return _uncorrected_s(delivery, pixels) * (1.0 if nearest is None else means[nearest][0])

    def observe(self, delivery: Delivery, pixels: int, deliver_s: float) -> None:
        """Times that are not positive and finite are ignored."""
        if 0 < deliver_s < math.inf:
            means, size = self._means.setdefault(delivery, {}), pixels.bit_length()
            means[size] = moved_mean(*means.get(size, (1.0, 1)), deliver_s / _uncorrected_s(delivery, pixels))


def _uncorrected_s(delivery: Delivery, pixels: int) -> float:
    return BASE_S + S_PER_MEGAPIXEL[delivery] * pixels / 1e6

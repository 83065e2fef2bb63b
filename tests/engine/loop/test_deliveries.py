"""Deadlines that end with the last byte, in virtual time."""

import math

import msgspec
import pytest

from tests.engine.loop.test_loop import SPEC, Simulation
from tetrion.engine.errors import DeadlineUnmeetable, RequestError
from tetrion.engine.loop.deliveries import MAX_ON_THE_WAY, Deliveries
from tetrion.engine.loop.requests import Request
from tetrion.engine.planning.cost.delivery import DeliveryModel
from tetrion.engine.request import Delivered, Delivery, ImageRequest, ImageResult
from tetrion.engine.resolve import resolve_request

ALONE_S = 0.005 + 12 * 0.2 + 0.08
"""What a 512² takes on one device of the simulation."""
PREDICTED_S = DeliveryModel().predict_s("png", 512 * 512)


class Delivering(Simulation):
    """Hands each picture on `deliver_s` after it is drawn; None: its client goes away."""

    def __init__(self, deliver_s: float | None, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._deliver_s = deliver_s
        self.delivered: dict[str, Delivered | None] = {}

    def _receive(self, output: object) -> None:
        if isinstance(output, ImageResult) and output.request_id not in self.delivered:
            request_id, loop = output.request_id, self.loop
            self.delivered[request_id] = None
            if self._deliver_s is None:
                loop.deliveries.dropped(request_id)
            else:
                due_s = self.executor.now_s() + self._deliver_s

                def deliver() -> None:
                    assert self._deliver_s is not None
                    self.delivered[request_id] = loop.delivered(request_id, self._deliver_s)
                    super(Delivering, self)._receive(output)  # type: ignore[arg-type]

                self.executor.at(due_s, deliver)
                return
        super()._receive(output)  # type: ignore[arg-type]


def figures(simulation: Simulation) -> tuple[int, int, int, int]:
    found = simulation.loop.deliveries.figures
    return found.num_delivered, found.num_dropped, found.num_met, found.num_missed


def test_a_deadline_is_met_or_missed_by_the_last_byte() -> None:
    for deliver_s, slo_s, is_met in ((0.3, ALONE_S + 0.4, True), (0.5, ALONE_S + 0.4, False)):
        simulation = Delivering(deliver_s, num_devices=1)
        simulation.request("a", width=512, height=512, slo_ms=1e3 * slo_s, delivery="png")
        simulation.run()
        delivered = simulation.delivered["a"]
        assert delivered is not None and delivered.slo_met is is_met
        assert delivered.deliver_s == pytest.approx(deliver_s)
        assert delivered.latency_s == pytest.approx(simulation.results["a"].latency_s + deliver_s)
        assert figures(simulation) == (1, 0, is_met, not is_met)


def test_without_a_delivery_all_ends_with_the_picture() -> None:
    simulation = Simulation(num_devices=1)
    simulation.request("a", width=512, height=512, slo_ms=1e3 * (ALONE_S + 0.02))
    simulation.request("b", 20.0, width=512, height=512, slo_ms=1e3 * (ALONE_S - 0.02))
    simulation.request("c", 40.0, width=512, height=512)
    simulation.run()
    assert [simulation.results[name].slo_met for name in "abc"] == [True, False, None]
    assert figures(simulation) == (3, 0, 1, 1)
    assert simulation.loop.deliveries.figures.deliver_s == 0.0


def test_a_picture_that_nobody_took_counts_for_no_deadline() -> None:
    simulation = Delivering(None, num_devices=1)
    simulation.request("a", width=512, height=512, slo_ms=60_000, delivery="png")
    simulation.run()
    assert figures(simulation) == (0, 1, 0, 0)
    assert simulation.loop.delivered("a", 0.1) is None
    assert figures(simulation) == (0, 1, 0, 0)


def test_the_engine_is_done_early_enough_for_the_delivery() -> None:
    """Two devices are needed to be done in time to deliver; without a delivery one would do."""
    slo_ms = 1e3 * (ALONE_S + 0.5 * PREDICTED_S + 0.01)
    degrees = {}
    deliveries: tuple[Delivery | None, ...] = (None, "png")
    for delivery in deliveries:
        simulation = Delivering(0.01, num_devices=4, policy="edf-best-fit")
        simulation.request("a", width=512, height=512, slo_ms=slo_ms, delivery=delivery)
        simulation.run()
        degrees[delivery] = set(simulation.results["a"].degrees)
    assert degrees[None] == {1} and max(degrees["png"]) > 1


def test_predictions_follow_what_deliveries_take() -> None:
    simulation = Delivering(20 * PREDICTED_S, num_devices=1)
    for i in range(40):
        simulation.request(f"r{i:02}", 10.0 * i, width=512, height=512, delivery="png")
    simulation.run()
    assert simulation.loop.deliveries.model.predict_s("png", 512 * 512) == pytest.approx(20 * PREDICTED_S, rel=0.1)


def test_the_earliest_deadline_that_is_told_leaves_time_for_the_delivery() -> None:
    def earliest_slo_ms(delivery: Delivery | None) -> float:
        loop = Delivering(0.0, num_devices=1, planner={"admission": "reject-hopeless"}).loop
        asked = ImageRequest(prompt="x", seed=1, width=512, height=512, slo_ms=100, delivery=delivery)
        with pytest.raises(DeadlineUnmeetable) as refused:
            loop.submit(resolve_request(asked, SPEC, 1))
        loop.submit(
            resolve_request(
                msgspec.structs.replace(asked, slo_ms=refused.value.earliest_slo_ms, request_id="a"), SPEC, 1
            )
        )
        return refused.value.earliest_slo_ms

    assert earliest_slo_ms("png") - earliest_slo_ms(None) == pytest.approx(1e3 * PREDICTED_S, abs=1.0)


def test_callers_that_never_report_do_not_fill_the_memory() -> None:
    deliveries = Deliveries()
    for i in range(MAX_ON_THE_WAY + 10):
        asked = ImageRequest(prompt="x", request_id=f"r{i}", delivery="jpeg")
        deliveries.finished(Request(resolve_request(asked, SPEC, 1), 0.0), 1.0)
    assert deliveries.figures.num_dropped == 10
    assert deliveries.delivered("r9", 2.0, 1.0) is None
    delivered = deliveries.delivered("r10", 2.0, 1.0)
    assert delivered is not None and (delivered.latency_s, delivered.deliver_s) == (2.0, 1.0)


def test_a_delivery_that_is_not_known_names_those_that_are() -> None:
    with pytest.raises(RequestError, match="delivery: must be one of png, jpeg, webp, got 'gif'"):
        resolve_request(ImageRequest(prompt="x", delivery="gif"), SPEC, 1)  # type: ignore[arg-type]


def test_an_absurd_prediction_only_makes_a_deadline_hopeless() -> None:
    simulation = Delivering(0.01, num_devices=1)
    for _ in range(100):
        simulation.loop.deliveries.model.observe("png", 512 * 512, 1e6)
    simulation.request("a", width=512, height=512, slo_ms=1000, delivery="png")
    simulation.request("b", width=512, height=512, slo_ms=8000)
    simulation.run()
    assert simulation.results.keys() == {"a", "b"} and math.isfinite(simulation.results["a"].latency_s)
    assert simulation.results["b"].slo_met is True

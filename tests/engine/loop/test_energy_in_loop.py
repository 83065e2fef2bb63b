"""Energy modes and budgets through the real loop, in virtual time. The joules are written by hand, not measured."""

import msgspec
import pytest

from tests.engine.loop.test_loop import PROFILE, SPEC, Simulation
from tetrion.engine.errors import BudgetUnmeetable, RequestError
from tetrion.engine.planning.cost.profile import ClassCost
from tetrion.engine.planning.energy_admission import cheapest_for
from tetrion.engine.request import EnergyOptions, ImageRequest
from tetrion.engine.resolve import resolve_request

STEP_J = {1: 60.0, 2: 70.0, 3: 85.0, 4: 100.0}


def metered(cost: ClassCost) -> ClassCost:
    return msgspec.structs.replace(cost, step_j={d: cost.step_ms[d] / 200 * d * 60 for d in STEP_J}, decode_j=8.0)


WITH_JOULES = msgspec.structs.replace(
    PROFILE,
    classes={
        "128x128": metered(PROFILE.classes["128x128"]),
        "512x512": msgspec.structs.replace(PROFILE.classes["512x512"], step_j=STEP_J, encode_j=1.0, decode_j=8.0),
    },
)


def drawn(wish: EnergyOptions | None = None, *, slo_ms: float | None = None, **options: object) -> tuple[int, ...]:
    """The degrees of a 512² request of 12 steps that has four devices to itself."""
    simulation = Simulation(profile=WITH_JOULES, planner={"options": options})
    simulation.request("a", width=512, height=512, slo_ms=slo_ms, energy=wish or EnergyOptions())
    simulation.run()
    assert simulation.results["a"].slo_met is not False
    return simulation.results["a"].degrees


def test_the_servers_mode_holds_for_requests_that_name_none() -> None:
    assert drawn() == (4,) * 12
    assert drawn(energy="least-energy") == (1,) * 12
    assert drawn(EnergyOptions(mode="fastest"), energy="least-energy") == (4,) * 12
    assert drawn(EnergyOptions(mode="least-energy")) == (1,) * 12
    assert set(drawn(EnergyOptions(mode="least-energy"), slo_ms=1500)) <= {1, 2}


@pytest.mark.parametrize("slo_ms", [None, 1000.0, 1400.0, 2000.0, 5000.0])
@pytest.mark.parametrize("mode", ["fastest", "balanced", "least-energy"])
def test_a_budget_that_is_accepted_is_kept_and_so_is_the_deadline(mode: str, slo_ms: float | None) -> None:
    simulation = Simulation(profile=WITH_JOULES)
    table = simulation.loop._degree_tables()[SPEC.name, "512x512"]
    cheapest = cheapest_for(table, 12, None if slo_ms is None else slo_ms / 1e3)
    energy = EnergyOptions(mode=mode, budget_j=cheapest.joules + 20)  # type: ignore[arg-type]
    degrees = drawn(energy, slo_ms=slo_ms)
    assert sum(STEP_J[degree] for degree in degrees) + 9.0 <= cheapest.joules + 20


def test_a_budget_is_kept_at_a_size_whose_joules_are_estimated() -> None:
    simulation = Simulation(profile=WITH_JOULES)
    step_j = WITH_JOULES.cost("256x256").step_by_degree_j
    budget_j = 1.1 * cheapest_for(simulation.loop._degree_tables()[SPEC.name, "256x256"], 12, None).joules
    simulation.request("a", width=256, height=256, energy=EnergyOptions(budget_j=budget_j))
    simulation.run()
    degrees = simulation.results["a"].degrees
    assert len(set(degrees)) > 1 and sum(step_j[degree] for degree in degrees) <= budget_j


def test_those_who_wait_leave_slots_to_those_in_a_hurry() -> None:
    simulation = Simulation(profile=WITH_JOULES, max_inflight=4)
    for number in range(8):
        wish = EnergyOptions(mode="least-energy")
        simulation.request(f"patient{number}", width=512, height=512, slo_ms=8_000_000, energy=wish)
    simulation.request("hurry", at_s=0.5, width=512, height=512, slo_ms=4000)
    simulation.run()
    assert len(simulation.results) == 9 and all(result.slo_met for result in simulation.results.values())
    assert simulation.results["hurry"].queue_s == 0


def test_what_cannot_be_is_refused_and_nothing_is_queued() -> None:
    def refused(simulation: Simulation, error: type[RequestError], **fields: object) -> RequestError:
        params = ImageRequest(prompt="x", seed=1, request_id="a", width=512, height=512, **fields)  # type: ignore[arg-type]
        with pytest.raises(error) as caught:
            simulation.loop.submit(resolve_request(params, SPEC, 4))
        assert not len(simulation.loop.table)
        return caught.value

    small = refused(Simulation(profile=WITH_JOULES), BudgetUnmeetable, energy=EnergyOptions(budget_j=728))
    assert "729 J" in str(small) and small.field == "energy.budget_j"
    unknown = refused(Simulation(), RequestError, energy=EnergyOptions(mode="balanced"))
    assert "no joules (step_j) for 512x512" in str(unknown) and unknown.field == "energy.mode"

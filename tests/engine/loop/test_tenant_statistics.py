"""Sums by tenant: bounded, and none is lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loop.test_loop import Simulation
from tetrion.engine.loop.tenant_statistics import OTHERS, TenantFigures, TenantStatistics

EVENTS = st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(("met", "missed", "refused", "ran")))


@settings(deadline=None)
@given(st.lists(EVENTS), st.integers(1, 4))
def test_few_are_told_apart_and_sums_are_kept(events: list[tuple[str, str]], max_tenants: int) -> None:
    statistics, others = TenantStatistics(max_tenants), TenantFigures()
    for tenant, what in events:
        if what == "ran":
            statistics.ran(tenant, 1.0)
        elif what == "refused":
            statistics.refused(tenant)
        else:
            statistics.ended(tenant, is_met=what == "met")
        now = statistics.figures().get(OTHERS, TenantFigures())
        assert all(getattr(now, name) >= getattr(others, name) for name in now.__struct_fields__)
        others = now
    figures = statistics.figures()
    assert len(figures.keys() - {OTHERS}) <= max_tenants
    total = TenantFigures()
    for one in figures.values():
        total.add(one)
    counts = [sum(what == each for _, what in events) for each in ("met", "missed", "refused", "ran")]
    assert [total.num_met, total.num_missed, total.num_refused, total.device_s] == counts


def test_who_has_had_most_is_told_apart_whatever_else_comes() -> None:
    statistics = TenantStatistics(max_tenants=3)
    statistics.ran("large", 100.0)
    for number in range(1000):
        statistics.refused(f"{number}")
        statistics.ran(f"{number}", 0.01)
    figures = statistics.figures()
    assert len(figures) == 4 and figures["large"].device_s == 100.0


def test_the_loop_counts_by_tenant() -> None:
    simulation = Simulation(num_devices=1, planner={"admission": "all"})
    simulation.request("met", tenant="a", slo_ms=60_000)
    simulation.request("missed", tenant="a", slo_ms=1, width=512, height=512)
    simulation.request("without", tenant="b")
    simulation.request("given-up", tenant="b", slo_ms=90_000)
    simulation.request("given-up-late", tenant="b", slo_ms=1, num_steps=100, width=512, height=512)
    simulation.executor.at(0.01, lambda: simulation.loop.cancel("given-up"))
    simulation.executor.at(1.0, lambda: simulation.loop.cancel("given-up-late"))
    simulation.run()
    figures = simulation.loop.statistics.tenants.figures()
    assert (figures["a"].num_met, figures["a"].num_missed) == (1, 1)
    assert (figures["b"].num_met, figures["b"].num_missed) == (0, 1)
    busy_s = sum(sum([r.encode_s, r.denoise_s, r.decode_s]) for r in simulation.results.values())
    assert figures["a"].device_s + figures["b"].device_s >= busy_s - 1e-6

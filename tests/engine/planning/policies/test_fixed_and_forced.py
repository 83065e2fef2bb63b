import pytest

from tests.engine.planning.simulation import SimRequest, Simulation, costs_of, flux_profile, make_profile
from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.policies.fixed import fixed_planner, static_groups
from tetrion.engine.planning.policies.forced import pinned_chunk_steps, pinned_degree
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.snapshot import DeviceView, RequestView, Snapshot


def snapshot(num_devices: int, profile: Profile | None = None, **fields: object) -> Snapshot:
    values: dict[str, object] = {
        "now_s": 0.0,
        "requests": (),
        "devices": tuple(DeviceView(device_id=i, free_s=0.0) for i in range(num_devices)),
        "config": PlannerConfig(),
    }
    values |= fields
    tables = DegreeTables(costs_of(profile or flux_profile()), len(values["devices"]))  # type: ignore[arg-type]
    return Snapshot(**values, tables=tables)  # type: ignore[arg-type]


def request(request_id: str, **fields: object) -> RequestView:
    values: dict[str, object] = {
        "stage": "denoise",
        "model": "",
        "cost_key": "512x512",
        "step_index": 0,
        "num_steps": 12,
        "arrival_s": 0.0,
        "deadline_s": None,
        "ready_s": 0.0,
    }
    return RequestView(request_id=request_id, **{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_devices", "group_size", "groups"),
    [
        (4, 2, [(0, 1), (2, 3)]),
        (5, 2, [(0, 1), (2, 3)]),
        (3, 8, [(0, 1, 2)]),
        (8, 5, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (0, 2, []),
    ],
)
def test_static_groups(num_devices: int, group_size: int, groups: list[tuple[int, ...]]) -> None:
    assert static_groups(snapshot(num_devices), group_size) == groups


def test_fixed_serves_in_order_of_arrival_and_keeps_the_group() -> None:
    done: list[str] = []
    trace = [SimRequest(f"r{9 - i}", 0.01 * i, 512, 512, 6, None) for i in range(8)]

    def note(view: Snapshot, plan: object) -> None:
        done.extend(a.request_id for a in plan.assignments if a.stage == "encode")  # type: ignore[attr-defined]

    groups: dict[str, set[tuple[int, ...]]] = {}

    def watch(view: Snapshot, plan: object) -> None:
        note(view, plan)
        for assignment in plan.assignments:  # type: ignore[attr-defined]
            home = (0, 1) if assignment.members[0] < 2 else (2, 3)
            assert set(assignment.members) <= set(home)
            groups.setdefault(assignment.request_id, set()).add(home)
            assert len(assignment.members) == (2 if assignment.stage == "denoise" else 1)

    Simulation(fixed_planner(2), trace, 4, flux_profile(), on_plan=watch).run()
    assert done == [r.request_id for r in trace]
    assert all(len(homes) == 1 for homes in groups.values())


def test_fixed_falls_back_to_a_degree_that_the_profile_has() -> None:
    sparse = make_profile({"512x512": {"step_ms": {1: 9.0, 2: 6.0}, "encode_ms": 1, "decode_ms": 1}})
    plan = fixed_planner(4)(snapshot(4, sparse, requests=(request("a"),)))
    assert plan.assignments[0].members == (0, 1)


def test_fixed_serves_a_request_whose_group_is_gone() -> None:
    devices = tuple(DeviceView(device_id=i, free_s=0.0) for i in (0, 1, 3))
    view = snapshot(3, devices=devices, requests=(request("a", members=(2,)), request("b", members=(3,))))
    assert {a.request_id for a in fixed_planner(2)(view).assignments} == {"a"}


def test_a_group_size_has_a_bound() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        fixed_planner(0)


def test_pinned_degrees_and_chunks() -> None:
    pinned = request("a", force_degrees=(1, 2, 2, 4))
    assert [pinned_degree(request("a", force_degrees=(1, 2, 2, 4), step_index=i), (1, 2, 4)) for i in range(6)] == [
        1, 2, 2, 4, 4, 4,
    ]  # fmt: skip
    assert pinned_chunk_steps(pinned, 0.01, 0.15) == 1
    assert pinned_chunk_steps(request("a", force_degrees=(1, 2, 2, 4), step_index=1), 0.01, 0.15) == 2
    assert pinned_chunk_steps(request("a", force_degrees=(1, 2, 2, 4), step_index=3), 0.01, 0.15) == 9
    assert pinned_chunk_steps(request("a", force_degrees=(1, 1, 1)), 0.01, 0.02) == 2
    assert pinned_degree(request("a", force_degrees=(8,)), (1, 2, 3)) == 3, "a worker was lost"


def test_a_forced_request_reserves_the_devices_that_are_free_first() -> None:
    devices = tuple(DeviceView(device_id=i, free_s=t) for i, t in enumerate((0.0, 0.1, 0.0, 0.5)))
    forced = request("a", force_degrees=(3,))
    newer = [request(f"r{i}", arrival_s=0.001) for i in range(4)]
    plan = get_planner("horizon")(snapshot(4, devices=devices, requests=(forced, *newer)))
    assert plan.assignments == (), "devices 0 and 2 wait for device 1"
    older = [request(f"r{i}", arrival_s=-0.001) for i in range(4)]
    plan = get_planner("horizon")(snapshot(4, devices=devices, requests=(forced, *older)))
    assert {device for a in plan.assignments for device in a.members} == {0, 2}


@pytest.mark.parametrize("policy", ["horizon", "fixed-1", "fixed-4"])
def test_endless_streams_starve_neither_forced_nor_other_requests(policy: str) -> None:
    forced = [SimRequest(f"f{i:03d}", 1.0 * i, 512, 512, 8, None, force_degrees=(4, 1)) for i in range(60)]
    others = [SimRequest(f"r{i:03d}", 0.3 * i, 512, 512, 8, 3.0) for i in range(200)]
    Simulation(get_planner(policy), [*forced, *others], 4, flux_profile(), PlannerConfig(patience_s=5.0)).run()
    assert max(r.finish_s - r.arrival_s for r in forced) < 20
    assert max(r.finish_s - r.arrival_s for r in others) < 30


def test_forced_requests_of_all_devices_take_turns() -> None:
    trace = [SimRequest(f"f{i}", 0.0, 1024, 1024, 6, None, force_degrees=(8, 4, 8, 1)) for i in range(5)]
    Simulation(get_planner("horizon"), trace, 8, flux_profile()).run()
    assert all(r.degrees == [8, 4, 8, 1, 1, 1] for r in trace)

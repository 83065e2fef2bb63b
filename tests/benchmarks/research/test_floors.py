"""Library floors modelled from a step's operators with rates of measured ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.research.commands import run
from benchmarks.research.floors import fit, usual_shape, work_of
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.entrypoints.bench.extrapolation import read_floors

RATES = np.array([700e12, 500e12, 4e12])


def test_the_rates_are_those_that_the_floors_were_made_with() -> None:
    works = list(np.random.default_rng(1).uniform(1, 100, (6, 3)) * [1e12, 1e12, 1e9])
    rates = fit(works, [float(1e3 * work @ (1 / RATES)) for work in works])
    assert [rates.gemm_flops, rates.attention_flops, rates.bytes] == pytest.approx(list(RATES))
    assert rates.num == 6 and rates.error == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="too few different floors"):
        fit(works[:2], [1.0, 1.0])


def test_branches_that_go_apart_are_one_each() -> None:
    spec = read_model_spec(resolve_model("shapes-sd3"), "dummy")
    shape = usual_shape(spec, (128, 128))
    assert shape.num_branches == 2
    alone, both = work_of(spec, spec.shape(128, 128), 1), work_of(spec, shape, 1)
    assert list(both) == list(2 * alone) and list(work_of(spec, shape, 2)) == list(alone)


def test_the_file_extends_cost_tables_and_says_that_it_is_modelled(tmp_path: Path) -> None:
    spec = read_model_spec(resolve_model("shapes"), "dummy")
    works = {(px, n): work_of(spec, usual_shape(spec, (px, px)), n) for px in (128, 256) for n in (1, 2, 4)}
    rows = [
        {"system": "floor", "px": px, "degree": n, "floor_ms": float(1e3 * work @ (1 / RATES))}
        for (px, n), work in works.items()
    ]
    measured = {"model": "shapes", "host": {"gpus": [{"name": "some GPU"}]}, "rows": rows}
    (tmp_path / "step.json").write_text(json.dumps(measured))
    output = tmp_path / "F.json"
    words = ["floors", "--model", "shapes-sd3", "--measured", str(tmp_path / "step.json"), "--degrees", "1,2"]
    assert run([*words, "--sizes", "128x128", "--output", str(output)]) == 0
    floors = read_floors(output)
    assert floors.gpu == "some GPU" and floors.source.startswith("modelled, not measured")
    assert floors.floor_ms["128x128*2"][1] == pytest.approx(2 * floors.floor_ms["128x128*2"][2], abs=2e-3)
    (tmp_path / "step.json").write_text("{}")
    assert run([*words, "--output", str(output)]) != 0

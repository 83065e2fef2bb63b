"""`python -m benchmarks.research floors`: library floors of degrees that no GPU was at hand to measure, modelled.

A step's operators are those of the family's own forward pass (see `engine/models/recording.py`). Their floor is taken
as GEMM FLOPs at one rate, plus attention's at another, plus all bytes at a third. The rates are fitted to floors that
`tetrion bench step` measured on one kind of GPU; the file says which, and how far they are off there. Profiles are
extended by ratios of floors (see `extrapolation.py`), so that an error that all degrees share does no harm.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tetrion.engine.families.served import read_model
from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.recording import Gemm, step_operators
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request
from tetrion.engine.shape import StepShape
from tetrion.entrypoints.bench.slo import as_input_error
from tetrion.entrypoints.bench.workloads import SIZES, Size
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.profile import checked_sizes
from tetrion.entrypoints.record import as_text, check_writable, commit, write_record

BYTES = 2
"""Of a bf16 number."""
NUM_RATES = 3


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a GPU does in a second. `num` measured floors deviate from what follows by at most `error`."""

    gemm_flops: float
    attention_flops: float
    bytes: float
    num: int
    error: float

    def floor_ms(self, work: np.ndarray) -> float:
        return float(1e3 * work @ (1 / np.array([self.gemm_flops, self.attention_flops, self.bytes])))


def usual_shape(spec: ModelSpec, size: Size) -> StepShape:
    """Of a picture in the guidance branches that the model draws in unless told otherwise."""
    asked = resolve_request(ImageRequest(prompt="a picture", width=size[0], height=size[1]), spec, 1)
    return spec.shape(*size, asked.params.shape.num_branches)


def work_of(spec: ModelSpec, shape: StepShape, degree: int) -> np.ndarray:
    """FLOPs of GEMMs, FLOPs of attention, bytes read and written, of a step on the device with most of them."""
    work = np.zeros(NUM_RATES)
    for one in step_operators(spec, shape, degree):
        if isinstance(one, Gemm):
            numbers = one.rows * one.inputs + one.inputs * one.outputs + one.rows * one.outputs
            work += one.flops, 0, BYTES * numbers
        else:
            work += 0, one.flops, BYTES * 2 * one.tokens * (one.heads + one.heads // one.heads_per_key) * one.head_dim
    return work


def fit(works: Sequence[np.ndarray], measured_ms: Sequence[float]) -> Rates:
    """The rates with the least squares of relative errors. Raises ValueError where too little was measured."""
    relative = np.array(works) / np.array(measured_ms)[:, None]
    scale = relative.max(axis=0, initial=1e-30)
    found, _, rank, _ = np.linalg.lstsq(relative / scale, np.ones(len(measured_ms)), rcond=None)
    if rank < NUM_RATES or min(found) <= 0:
        raise ValueError("measured: too few different floors to tell rates of GEMMs, attention and memory apart")
    gemm_ms, attention_ms, bytes_ms = (found / scale).tolist()
    rates = Rates(
        gemm_flops=1e3 / gemm_ms, attention_flops=1e3 / attention_ms, bytes=1e3 / bytes_ms, num=len(works), error=0.0
    )
    errors = [abs(rates.floor_ms(work) / ms - 1) for work, ms in zip(works, measured_ms, strict=True)]
    return msgspec.structs.replace(rates, error=max(errors))


def command(
    *,
    model: str,
    measured: Path,
    degrees: Sequence[int],
    sizes: str | None = None,
    output: Path | None = None,
    command_line: str = "python -m benchmarks.research floors",
) -> None:
    """What the command does: print (and write) a table that `tetrion bench slo --floors` reads. Raises InputError."""
    check_writable(output, "output")
    with as_input_error():
        spec = _spec(model)
        known, gpu, rows = _measured(measured)
        floors = [
            (work_of(known, usual_shape(known, (row["px"], row["px"])), row["degree"]), row["floor_ms"]) for row in rows
        ]
        rates = fit([work for work, _ in floors], [ms for _, ms in floors])
    shapes = [usual_shape(spec, size) for size in checked_sizes(spec, sizes, SIZES)]
    made = {
        "gpu": gpu,
        "source": _in_words(rates, known.name, measured),
        "commit": commit(),
        "command": command_line,
        "rates": msgspec.structs.asdict(rates),
        "floor_ms": {
            shape.cost_key: {
                str(degree): round(rates.floor_ms(work_of(spec, shape, degree)), 3)
                for degree in degrees
                if degree in spec.legal_degrees(degree, shape.num_branches)
            }
            for shape in shapes
        },
    }
    write_record(made, output)
    print(as_text(made))


def _spec(model: str) -> ModelSpec:
    try:
        return read_model(model, "dummy")
    except CheckpointError as error:
        raise InputError(str(error)) from None


def _measured(path: Path) -> tuple[ModelSpec, str, list[dict[str, Any]]]:
    """Model, GPU and floors of a record of `tetrion bench step`."""
    try:
        record = msgspec.json.decode(path.read_bytes())
        rows = [row for row in record["rows"] if row["system"] == "floor"]
        return _spec(record["model"]), record["host"]["gpus"][0]["name"], rows
    except (OSError, msgspec.DecodeError, LookupError, TypeError) as error:
        raise InputError(f"measured: {path} is no record of tetrion bench step on GPUs: {error!r}") from None


def _in_words(rates: Rates, model: str, measured: Path) -> str:
    return (
        f"modelled, not measured: GEMMs at {rates.gemm_flops / 1e12:.0f} and attention at"
        f" {rates.attention_flops / 1e12:.0f} TFLOP/s, plus bytes at {rates.bytes / 1e12:.1f} TB/s; rates fitted to"
        f" {rates.num} floors of {model} ({measured.name}), within {rates.error:.0%}"
    )

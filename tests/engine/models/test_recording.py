"""What a step computes, from its own forward pass: FLUX.1-dev's published sizes, and what each member has of them."""

from collections import Counter

import pytest
import torch

from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.recording import Attention, Gemm, step_operators


@pytest.fixture(scope="module")
def flux() -> ModelSpec:
    return read_model_spec(resolve_model("flux1-dev"), "dummy")


@pytest.mark.parametrize(("px", "tflop"), [(256, 10.3), (512, 21.5), (1024, 74.4), (2048, 418)])
def test_a_step_of_flux_has_the_known_flops(flux: ModelSpec, px: int, tflop: float) -> None:
    operators = step_operators(flux, flux.shape(px, px), degree=1)
    assert sum(operator.flops for operator in operators) / 1e12 == pytest.approx(tflop, rel=0.03)


def test_a_step_of_flux_has_its_published_operators(flux: ModelSpec) -> None:
    """19 double and 38 single blocks, 24 heads of 128, 512 text tokens and 4,096 of the image."""
    counted = Counter(step_operators(flux, flux.shape(1024, 1024), degree=1))
    text, image, hidden = 512, 4096, 3072
    expected = Counter({Gemm(image, 64, hidden): 1, Gemm(image, hidden, 64): 1})
    for rows in (text, image):
        expected += Counter(
            {
                Gemm(rows, hidden, 3 * hidden): 19,
                Gemm(rows, hidden, hidden): 19,
                Gemm(rows, hidden, 4 * hidden): 19,
                Gemm(rows, 4 * hidden, hidden): 19,
            }
        )
    expected += Counter(
        {
            Gemm(text + image, hidden, 3 * hidden): 38,
            Gemm(text + image, hidden, 4 * hidden): 38,
            Gemm(text + image, 5 * hidden, hidden): 38,
            Attention(text + image, 24, 128): 57,
        }
    )
    assert counted == expected


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_degree_divides_rows_of_gemms_and_heads_of_attention(flux: ModelSpec, degree: int) -> None:
    whole, part = (step_operators(flux, flux.shape(1024, 1024), n) for n in (1, degree))
    assert len(whole) == len(part)
    for one, own in zip(whole, part, strict=True):
        match one:
            case Gemm():
                assert own == one._replace(rows=one.rows // degree)
            case Attention():
                assert own == one._replace(heads=24 // degree)


def test_uneven_shares_are_rounded_up_in_every_segment(flux: ModelSpec) -> None:
    """At degree 3 of 512 text and 81 image tokens a member has 171 and 27."""
    shape = flux.shape(144, 144)
    operators = step_operators(flux, shape, 3)
    assert {operator.rows for operator in operators if isinstance(operator, Gemm)} == {171, 27, 198}
    assert {operator for operator in operators if isinstance(operator, Attention)} == {Attention(593, 8, 128)}


def test_recording_touches_no_memory(flux: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    empty = torch.empty

    def watched(*size: object, **named: object) -> torch.Tensor:
        tensor = empty(*size, **named)  # type: ignore[call-overload]
        made.append(tensor.device)
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    step_operators(flux, flux.shape(256, 256), 1)
    assert made and {device.type for device in made} == {"meta"}

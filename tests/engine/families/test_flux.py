"""What FLUX.1 takes of a request."""

import pytest

from tests.engine.specs import make_spec
from tetrion.engine.errors import RequestError
from tetrion.engine.families.flux import FAMILY
from tetrion.engine.families.served import serving
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

SPEC = make_spec()


def request(**fields: object) -> ImageRequest:
    return ImageRequest(prompt="x", width=256, height=128, **fields)  # type: ignore[arg-type]


def test_a_row_covers_16_by_16_pixels_and_the_text_is_of_full_length() -> None:
    shape = FAMILY.shape(SPEC, request())
    assert (shape.image, shape.text, shape.cost_key) == (128, (64,), "256x128")


@pytest.mark.parametrize("fields", [{}, {"true_cfg_scale": 1.0}, {"true_cfg_scale": 0.5}])
def test_without_both_a_scale_and_a_negative_prompt_there_is_one_branch(fields: dict[str, object]) -> None:
    FAMILY.check(SPEC, request(**fields))
    assert FAMILY.shape(SPEC, request(**fields)).num_branches == 1


def test_with_both_there_are_two() -> None:
    shape = FAMILY.shape(SPEC, request(negative_prompt="", true_cfg_scale=4.0))
    assert (shape.text, shape.cost_key) == ((64, 64), "256x128*2")


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"negative_prompt": "blue"}, "negative_prompt", "true_cfg_scale above 1"),
        ({"negative_prompt": "blue", "true_cfg_scale": 1.0}, "negative_prompt", "true_cfg_scale above 1"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale", "negative_prompt"),
    ],
)
def test_one_without_the_other_is_refused(fields: dict[str, object], field: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        resolve_request(request(**fields), SPEC, 2)
    assert caught.value.field == field


def test_fields_that_a_model_does_not_take_are_refused_by_name() -> None:
    spec = make_spec(inputs=frozenset())
    with pytest.raises(RequestError, match="negative_prompt: is no input of model 'tiny'"):
        resolve_request(request(negative_prompt="blue"), spec, 2)


def test_a_request_may_name_its_model() -> None:
    models = serving(make_spec(name="first"), make_spec(name="second"))
    assert resolve_request(request(), models, 2).params.model == "first"
    assert resolve_request(request(model="second"), models, 2).params.model == "second"
    with pytest.raises(RequestError, match="model: 'third' is not served here; served: first, second"):
        resolve_request(request(model="third"), models, 2)

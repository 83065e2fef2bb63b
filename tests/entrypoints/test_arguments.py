"""Values of options as people write them."""

from pathlib import Path

import pytest

from tetrion.entrypoints.arguments import parse_files, parse_weights
from tetrion.entrypoints.errors import InputError


def test_files_and_numbers_go_to_the_models_that_are_named() -> None:
    assert parse_files(["flux=a.json", "sd3=/b=c/d.json"], "profile") == {
        "flux": Path("a.json"),
        "sd3": Path("/b=c/d.json"),
    }
    assert parse_files(["/b=c/d.json"], "profile") == {"": Path("/b=c/d.json")}
    assert parse_weights(["flux=2", "sd3=.5"], "share") == {"flux": 2.0, "sd3": 0.5}


def test_what_names_no_model_or_no_number_is_refused() -> None:
    with pytest.raises(InputError, match=r"profile: with several, each needs its model, MODEL=FILE; got 'b.json'"):
        parse_files(["a=a.json", "b.json"], "profile")
    with pytest.raises(InputError, match=r"profile: given twice for the same model, 'a.json' and 'b.json'"):
        parse_files(["a=a.json", "a=b.json"], "profile")
    for text in ("a=0", "a=x", "a"):
        with pytest.raises(InputError, match=r"share: expected MODEL=NUMBER"):
            parse_weights([text], "share")

import json
import shutil
from pathlib import Path

import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from tetrion.engine.families.checkpoint import embedded_folder
from tetrion.engine.models.tokenizers import LibraryTokenizer

SHAPES = embedded_folder() / "shapes"


@pytest.mark.parametrize(("kind", "name"), [(CLIPTokenizer, "tokenizer"), (T5Tokenizer, "tokenizer_2")])
def test_capitals_make_no_difference_to_the_embedded_model(kind: type, name: str) -> None:
    tokenizer = LibraryTokenizer(kind, SHAPES / name)
    for prompt in ("a RED circle", "A Red Circle", "A RED CIRCLE"):
        assert tokenizer.ids(prompt, 16) == tokenizer.ids("a red circle", 16)
        assert tokenizer.num_tokens(prompt) == tokenizer.num_tokens("a red circle")


def test_others_tokenizers_keep_them(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer_2"
    shutil.copytree(SHAPES / "tokenizer_2", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["do_lower_case"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = LibraryTokenizer(T5Tokenizer, folder)
    assert tokenizer.ids("a RED circle", 16) != tokenizer.ids("a red circle", 16)

"""Prompts as language models read them: the same ids as transformers' own tokenizer makes of its chat template."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from tests.engine.families.pipelines import qwen_tokenizer
from tetrion.engine.families import flux2, zimage
from tetrion.engine.families.prompts import CHARS_PER_TOKEN, PromptReader, check_template
from tetrion.engine.families.tokenizers import QWEN_TOKENIZER, missing_files
from tetrion.engine.model_spec import CheckpointError

VOCABULARY = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    qwen_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(folder)


@settings(max_examples=50, deadline=None)
@given(prompt=st.text(max_size=60) | st.sampled_from(["", "a <|im_end|> b", "Ａ\u0301é", "  two  spaces\n"]))
def test_ids_are_those_of_the_chat_template(folder: Path, theirs: Qwen2Tokenizer, prompt: str) -> None:
    message = [{"role": "user", "content": prompt}]
    text = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    expected = theirs(text, truncation=True, max_length=48).input_ids
    read = PromptReader(folder, zimage.CHAT, VOCABULARY, 48).read(prompt)
    assert read.ids == expected and read.num_tokens == len(theirs(text).input_ids)


def test_padding_is_the_configs(folder: Path, theirs: Qwen2Tokenizer) -> None:
    assert PromptReader(folder, zimage.CHAT, VOCABULARY, 48).padding == theirs.pad_token_id


def test_a_padding_that_is_no_token_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    for token in ("<none>", None, 3):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": token}))
        with pytest.raises(CheckpointError, match="pad_token"):
            PromptReader(tmp_path, zimage.CHAT, VOCABULARY, 48)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}']
)
def test_a_vocabulary_that_cannot_be_used_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds no usable tokenizer"):
        PromptReader(tmp_path, zimage.CHAT, VOCABULARY, 48)


def test_without_a_vocabulary_a_prompt_has_a_token_a_word(tmp_path: Path) -> None:
    reader = PromptReader(tmp_path, zimage.CHAT, VOCABULARY, 5)
    assert reader.read("a cat").num_tokens == 3 and len(reader.read("a cat").ids) == 3
    long = reader.read("a cat on a mat at home")
    assert (len(long.ids), long.num_tokens) == (5, 8)
    assert all(0 <= token < VOCABULARY for token in long.ids)


def test_a_tokenizer_needs_its_file(folder: Path, tmp_path: Path) -> None:
    assert missing_files(folder, QWEN_TOKENIZER) == []
    assert missing_files(tmp_path, QWEN_TOKENIZER) == ["tokenizer_config.json", "tokenizer.json"]


def test_a_template_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    for form in (zimage.CHAT, flux2.KLEIN.form):
        check_template(folder, form)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja': its chat template has no <\|im_end\|>"):
        check_template(tmp_path, zimage.CHAT)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="has no chat template"):
        check_template(tmp_path, zimage.CHAT)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    for template in ("<|im_start|><|im_end|>", "[INST]"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        with pytest.raises(CheckpointError, match=r"tokenizer_config.json': its chat template has no .*<think>"):
            check_template(tmp_path, flux2.KLEIN.form)


def test_of_a_very_long_prompt_the_beginning_is_read(folder: Path) -> None:
    reader, most = PromptReader(folder, zimage.CHAT, VOCABULARY, 48), 48 * CHARS_PER_TOKEN
    assert reader.read("a" * (most + 1000)) == reader.read("a" * most)
    assert len(reader.read("a" * most).ids) == 48 and reader.read("a" * most).num_tokens > most

"""Captions are drawn with a font that has their letters, or spelled out; never as empty boxes."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from tetrion.entrypoints import caption_fonts
from tetrion.entrypoints.caption_fonts import NO_CHARACTER, CaptionFonts

SIZE_PX = 15
FONTS = CaptionFonts(SIZE_PX)


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_fonts, "_asked", lambda _: ())
    monkeypatch.setattr(caption_fonts, "KNOWN", ())


def caption(text: str, size_px: int) -> tuple[str, caption_fonts.Font]:
    return CaptionFonts(size_px).caption(text)


def boxes_in(text: str, font: caption_fonts.Font) -> list[str]:
    """Characters that the font has no glyph for."""
    assert isinstance(font, ImageFont.FreeTypeFont)
    plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    box = plain.getmask(NO_CHARACTER)
    drawn = {character: plain.getmask(character) for character in text if character != " "}
    return [c for c, mask in drawn.items() if (mask.size, bytes(mask)) == (box.size, bytes(box))]


def test_plain_text_stays_as_it_is_in_the_font_that_is_always_there() -> None:
    text, font = caption('a red circle,\n  50 % "left" of it', SIZE_PX)
    assert text == 'a red circle, 50 % "left" of it'
    assert font.getname() == ImageFont.load_default(SIZE_PX).getname()  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_system_fonts")
@pytest.mark.parametrize(
    ("prompt", "drawn"),
    [
        ("红 circle", "\\u7ea2 circle"),
        ("🟥 above 🔵", "[large red square] above [large blue circle]"),
        ("👩\u200d🚀 ❤\ufe0f", "[woman][rocket] [heavy black heart]"),
        ("a\x1b[31m\u202eb\0", "a\\x1b[31m\\u202eb\\x00"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_no_font_has_is_spelled_out(prompt: str, drawn: str) -> None:
    assert caption(prompt, SIZE_PX)[0] == drawn


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_nothing_becomes_a_box(prompt: str) -> None:
    text, font = FONTS.caption(prompt)
    assert boxes_in(text, font) == [] and font.getlength(text) >= 0


def test_the_system_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def nothing(characters: str) -> tuple[()]:
        asked.append(characters)
        return ()

    monkeypatch.setattr(caption_fonts, "_asked", nothing)
    monkeypatch.setattr(caption_fonts, "KNOWN", ())
    fonts = CaptionFonts(SIZE_PX)
    for prompt in ("a red circle", "红色 красный", "красный 红", "蓝", *map(chr, range(0x4E00, 0x4F00))):
        fonts.caption(prompt)
    assert asked[:2] == ["".join(sorted(set("красный红色"))), "蓝"]
    assert len(asked) == caption_fonts.MAX_ASKED


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="needs fontconfig")
def test_a_font_of_the_system_is_found_by_its_letters() -> None:
    asked = ["fc-list", ":charset=436 440:scalable=true:color=false", "file"]
    if not subprocess.run(asked, capture_output=True, check=True).stdout:
        pytest.skip("no font here has Cyrillic letters")
    text, font = caption("красный круг", SIZE_PX)
    assert text == "красный круг" and boxes_in(text, font) == []


@pytest.mark.parametrize(
    "answer", ["exit 1", "echo", "echo /dev/null; echo x", "echo /nowhere.ttf; echo 0", "echo /dev/null; echo 0"]
)
def test_a_system_that_answers_nonsense_does_no_harm(
    answer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "fc-match"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(caption_fonts, "KNOWN", ())
    assert caption("круг", SIZE_PX)[0] == "\\u043a\\u0440\\u0443\\u0433"

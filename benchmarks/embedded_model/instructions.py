"""Instructions that change a picture: "make the circle blue", "add a green ring above the square"; wording and tags.

Owns words and grammar as `captions.py` does for scenes; which scenes an edit leads from and to is `edits.py`'s.
"""

import random
from dataclasses import dataclass, field

from benchmarks.embedded_model.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Chunks,
    with_article,
)
from benchmarks.embedded_model.world import SIZES, Thing

SLOTS = 3
"""Things of a scene that an edit may lead from or to."""
OPERATIONS = ("colour", "size", "shape", "remove", "add", "background")
TARGET, VALUE, ANCHOR = 0, 1, 2
"""Whom a word describes: the thing that is changed, what it becomes (or the thing that is added), the thing beside."""
FRAMES = {
    "colour": (
        "make {t} {v}",
        "turn {t} {v}",
        "change {t} to {v}",
        "paint {t} {v}",
        "color {t} {v}",
        "recolor {t} to {v}",
        "change the color of {t} to {v}",
        "set the colour of {t} to {v}",
        "{t} should be {v}",
    ),
    "size": (
        "make {t} {v}",
        "change {t} to {v}",
        "resize {t} to {v}",
        "change the size of {t} to {v}",
        "set the size of {t} to {v}",
        "{t} should be {v}",
    ),
    "bigger": ("make {t} bigger", "make {t} larger", "enlarge {t}", "{t} should be bigger"),
    "smaller": ("make {t} smaller", "shrink {t}", "{t} should be smaller"),
    "shape": (
        "turn {t} into {v}",
        "replace {t} with {v}",
        "change {t} to {v}",
        "change {t} into {v}",
        "make {t} {v}",
        "swap {t} for {v}",
    ),
    "remove": (
        "remove {t}",
        "delete {t}",
        "erase {t}",
        "take {t} away",
        "take away {t}",
        "get rid of {t}",
        "delete {t} from the picture",
    ),
    "add": ("add {v}", "put {v}", "draw {v}", "place {v}", "insert {v}", "there should be {v}", "paint {v}"),
    "background": (
        "change the background to {v}",
        "make the background {v}",
        "turn the background {v}",
        "set the background to {v}",
        "paint the background {v}",
        "change the color of the background to {v}",
        "use {a} background",
        "put it on {a} background",
        "the background should be {v}",
    ),
}
"""Tag -> wordings, the canonical one first. {t}: the target; {v}: the value, {a}: with its article; of `add` the new
thing and where it goes."""
HELD_OUT_FRAMES = {
    "colour": ("let {t} be {v}", "set the color of {t} to {v}"),
    "size": ("let {t} be {v}", "set {t} to {v}"),
    "bigger": ("let {t} be bigger", "{t} should be larger"),
    "smaller": ("let {t} be smaller", "change {t} to smaller"),
    "shape": ("{t} should be {v}", "swap {t} with {v}"),
    "remove": ("remove {t} from the picture", "erase {t} from the picture"),
    "add": ("let there be {v}", "draw {v} in the picture"),
    "background": ("let the background be {v}", "set the color of the background to {v}"),
}
"""Never seen in training; of words that are (`let` in other wordings: `LET_FRAMES`)."""
LET_FRAMES = {"remove": ("let {t} go",), "bigger": ("let {t} grow",), "smaller": ("let {t} shrink",)}
OPENINGS = ("please", "now", "can you", "could you", "please")
NOUNS = ("one", "shape", "thing", "object")
TAGS = tuple(FRAMES)
ATTRIBUTES = ("size", "colour", "shape")
_SETS = (("shape",), ("colour", "shape"), ("size", "shape"), ("size", "colour", "shape"), ("colour",), ("size",))
"""Attributes that a description may name, the most usual first."""


@dataclass(frozen=True)
class Edit:
    """One change: things by slot (None: nobody), before and after; the background's names. All but slot `changed` stay
    (None: it is the background that changes). An added thing may have a `relation` to the one in slot `anchor`."""

    operation: str
    before: tuple[Thing | None, ...]
    after: tuple[Thing | None, ...]
    backgrounds: tuple[str, str]
    changed: int | None
    anchor: int | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Instruction:
    """The words, whom each describes (`Chunks` of captions: TARGET, VALUE, ANCHOR, "background" or None), and what they
    say: `tag` out of `TAGS`, attributes by whom they describe, a background."""

    chunks: Chunks
    tag: str
    said: dict[int, dict[str, str]] = field(default_factory=dict)
    relation: str | None = None
    background: str | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.chunks)


def instruction_words() -> list[str]:
    """Every word of the instructions, lower case, sorted; those of captions among them."""
    phrases = [
        frame for frames in (FRAMES, HELD_OUT_FRAMES, LET_FRAMES) for group in frames.values() for frame in group
    ]
    phrases += [*OPENINGS, *NOUNS, "it"]
    words = {word.strip(".,?") for phrase in phrases for word in phrase.split() if "{" not in word}
    return sorted(words)


def unique_descriptions(things: tuple[Thing | None, ...], slot: int) -> list[tuple[str, ...]]:
    """The sets of attributes that tell this thing from the others, the most usual first."""
    meant = things[slot]
    others = [thing for i, thing in enumerate(things) if thing is not None and i != slot]
    return [
        names
        for names in _SETS
        if not any(all(getattr(other, name) == getattr(meant, name) for name in names) for other in others)
    ]


class InstructionWriter:
    """Writes instructions for edits. `wording`: "canonical", "free" (training's) or "held-out"."""

    def __init__(self, seed: int, wording: str = "free") -> None:
        self._random = random.Random(seed)
        self._wording = wording

    def write(self, edit: Edit) -> Instruction:
        """Raises ValueError for a thing that no description tells from the others."""
        tag = self._tag(edit)
        said: dict[int, dict[str, str]] = {}
        parts: dict[str, Chunks] = {}
        if edit.operation == "background":
            words = self._word(BACKGROUND_WORDS, edit.backgrounds[1])
            parts["v"] = [(words, "background")]
            parts["a"] = [(with_article(words), "background")]
        elif edit.operation == "add":
            parts["v"] = self._added(edit, said)
        else:
            parts["t"] = self._description(edit, edit.changed, TARGET, said)
            parts["v"] = self._value(edit, tag, said)
        chunks = self._dressed(_filled(self._frame(tag, edit), parts))
        background = edit.backgrounds[1] if edit.operation == "background" else None
        return Instruction(chunks, tag, said, edit.relation, background)

    def _tag(self, edit: Edit) -> str:
        """The operation, or "bigger" and "smaller" for one step of size, at times."""
        if edit.operation != "size" or self._wording == "canonical" or self._random.random() < 0.65:
            return edit.operation
        sizes = tuple(SIZES)
        old, new = (sizes.index(things[edit.changed].size) for things in (edit.before, edit.after))
        return "size" if abs(new - old) > 1 else "bigger" if new > old else "smaller"

    def _frame(self, tag: str, edit: Edit) -> str:
        frames = FRAMES[tag] if self._wording != "held-out" else HELD_OUT_FRAMES[tag]
        if self._wording == "canonical":
            return frames[0]
        if self._wording == "free":
            frames = (*frames, *LET_FRAMES.get(tag, ()))
        return frames[0] if self._wording == "free" and self._random.random() < 0.25 else self._random.choice(frames)

    def _dressed(self, chunks: Chunks) -> Chunks:
        """With an opening, an end, a capital letter, at times."""
        r = self._random
        if self._wording == "canonical":
            return chunks
        if r.random() < 0.2:
            chunks = [(r.choice(OPENINGS) + " ", None), *chunks]
        if r.random() < 0.2:
            chunks = [*chunks, (r.choice((".", ".", " please", " now")), None)]
        if r.random() < 0.15:
            chunks = [(chunks[0][0].capitalize(), chunks[0][1]), *chunks[1:]]
        return chunks

    def _word(self, table: dict[str, tuple[str, ...]], name: str) -> str:
        is_plain = self._wording == "canonical" or self._random.random() < 0.6
        return name if is_plain else self._random.choice(table[name])

    def _description(self, edit: Edit, slot: int | None, owner: int, said: dict[int, dict[str, str]]) -> Chunks:
        """`the red circle`, as few attributes as will do, at times more; `it` where there is nothing else."""
        assert slot is not None
        names = unique_descriptions(edit.before, slot)
        if not names:
            raise ValueError(f"no description tells thing {slot} from the others")
        r, thing = self._random, edit.before[slot]
        assert thing is not None
        is_alone = sum(other is not None for other in edit.before) == 1
        if self._wording == "canonical":
            chosen = names[0]
        elif is_alone and r.random() < 0.2:
            said[owner] = {}
            return [("it", owner)]
        else:
            chosen = names[0] if r.random() < 0.4 else r.choice(names)
        said[owner] = {name: getattr(thing, name) for name in chosen}
        words = [self._attribute(name, said[owner][name]) for name in ATTRIBUTES if name in chosen]
        if "shape" not in chosen:
            words.append("one" if self._wording == "canonical" else r.choice(NOUNS))
        return [("the " + " ".join(words), owner)]

    def _attribute(self, name: str, value: str) -> str:
        return self._word({"size": SIZE_WORDS, "colour": COLOUR_WORDS, "shape": SHAPE_WORDS}[name], value)

    def _value(self, edit: Edit, tag: str, said: dict[int, dict[str, str]]) -> Chunks:
        old, new = edit.before[edit.changed or 0], edit.after[edit.changed or 0]
        if new is None or old is None or tag in ("bigger", "smaller", "remove"):
            return []
        if edit.operation in ("colour", "size"):
            said[VALUE] = {edit.operation: getattr(new, edit.operation)}
            return [(self._attribute(edit.operation, said[VALUE][edit.operation]), VALUE)]
        said[VALUE] = {"shape": new.shape}
        words = [self._attribute("shape", new.shape)]
        if new.colour != old.colour or (self._wording != "canonical" and self._random.random() < 0.15):
            said[VALUE]["colour"] = new.colour
            words.insert(0, self._attribute("colour", new.colour))
        return [(with_article(" ".join(words)), VALUE)]

    def _added(self, edit: Edit, said: dict[int, dict[str, str]]) -> Chunks:
        assert edit.changed is not None
        new = edit.after[edit.changed]
        assert new is not None
        said[VALUE] = {"shape": new.shape, "colour": new.colour}
        words = [self._attribute("colour", new.colour), self._attribute("shape", new.shape)]
        if new.size != "medium" or (self._wording != "canonical" and self._random.random() < 0.2):
            said[VALUE]["size"] = new.size
            words.insert(0, self._attribute("size", new.size))
        chunks: Chunks = [(with_article(" ".join(words)), VALUE)]
        if edit.relation is not None:
            relation = RELATION_WORDS[edit.relation]
            chosen = relation[0] if self._wording == "canonical" else self._random.choice(relation)
            chunks += [(f" {chosen} ", None), *self._description(edit, edit.anchor, ANCHOR, said)]
        return chunks


def _filled(frame: str, parts: dict[str, Chunks]) -> Chunks:
    """The frame with `{t}`, `{v}` and `{a}` replaced."""
    chunks: Chunks = []
    while frame:
        before, brace, rest = frame.partition("{")
        if before:
            chunks.append((before, None))
        if brace:
            name, _, frame = rest.partition("}")
            chunks += parts[name]
        else:
            frame = ""
    return chunks

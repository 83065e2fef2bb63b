"""Captions: the canonical wording of a scene, and a random wording with synonyms for training.

Owns words and grammar. A caption's tags say for each word which thing it belongs to (for pre-training text encoders).
"""

import random
from dataclasses import replace

from benchmarks.embedded_model.world import Scene, Thing

Chunks = list[tuple[str, int | str | None]]
"""Pieces of a caption; whom each describes: a thing's index, "background" or None."""

COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "cyan": ("cyan", "turquoise", "aqua"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "white": ("white",),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "disk", "dot", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus", "plus sign"),
    "ring": ("ring", "donut", "doughnut", "hoop"),
}
SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath", "underneath"),
}
BACKGROUND_WORDS = {
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
    "navy": ("navy", "navy blue", "dark blue"),
    "beige": ("beige", "cream"),
    "mint": ("mint", "mint green"),
}
BACKGROUND_FRAMES = (
    "on {a} background",
    "on {a} backdrop",
    "against {a} background",
    "against {a} backdrop",
    "with {a} background",
    "in front of {a} background",
    "on {b}",
)
OPENINGS = (
    "a picture of",
    "an image of",
    "a drawing of",
    "there is",
    "draw",
    "please draw",
    "show me",
    "an illustration of",
    "paint",
)
COPULAS = ("is", "sits", "placed", "that is", "which is", "located", "positioned", "lies")
LINKS = (", which is", "which is", ", that is", "that is", ",", ", itself", "")
NEUTRAL_WORDS = [
    "nice",
    "shiny",
    "bright",
    "pretty",
    "simple",
    "plain",
    "flat",
    "beautiful",
    "lovely",
    "solid",
    "clean",
    "single",
    "colorful",
    "colourful",
    "geometric",
    "cute",
    "glossy",
    "matte",
    "vivid",
    "perfect",
]
OTHER_WORDS = [
    "a",
    "an",
    "the",
    "one",
    "and",
    "next",
    "to",
    "beside",
    "with",
    "of",
    "in",
    "front",
    "side",
    "shape",
    "colored",
    "coloured",
    "photo",
    ".",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vocabulary() -> list[str]:
    """Every word the grammar may use, lower case, sorted."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, RELATION_WORDS, BACKGROUND_WORDS)
    phrases = [phrase for table in tables for synonyms in table.values() for phrase in synonyms]
    phrases += [*BACKGROUND_FRAMES, *OPENINGS, *COPULAS, *LINKS, *NEUTRAL_WORDS, *OTHER_WORDS]
    words = {word for phrase in phrases for word in phrase.replace("{a}", "").replace("{b}", "").split()}
    return sorted(word for word in words if word.isalpha() or "-" in word)


def with_article(words: str) -> str:
    """`red circle` -> `a red circle`, `orange star` -> `an orange star`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def canonical(scene: Scene) -> str:
    """The issue's canonical form: `a small red circle left of a large blue star on a navy background`.

    Medium and a white background stay unsaid; things without a relation are joined by `and`.
    """
    joins = [" and " if relation is None else f" {RELATION_WORDS[relation][0]} " for relation in scene.relations]
    text = _canonical_thing(scene.things[0])
    for i, (join, thing) in enumerate(zip(joins, scene.things[1:], strict=True)):
        in_list = join == " and " and i == 0 and joins[1:] == [" and "]
        text += (", " if in_list else join) + _canonical_thing(thing)
    return text if scene.background == "white" else f"{text} on {with_article(scene.background)} background"


def _canonical_thing(thing: Thing) -> str:
    return with_article(" ".join(w for w in (thing.size, thing.colour, thing.shape) if w not in ("", "medium")))


class CaptionWriter:
    """Writes random wordings of scenes as (text, owner) chunks; owner is a thing's index, "background" or None."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def write(self, scene: Scene) -> str:
        return "".join(text for text, _ in self.chunks(scene))

    def chunks(self, scene: Scene) -> Chunks:
        """Text pieces whose concatenation is the caption, each with the thing it describes."""
        r = self._random
        if r.random() < 0.35:
            return self._canonical_chunks(scene)
        body = self._body(scene)
        is_said = scene.background != "white" or r.random() < 0.35
        where = self._background(scene.background) if is_said else None
        if where is None:
            chunks = body
        elif r.random() < 0.82:
            chunks = [*body, (", " if r.random() < 0.1 else " ", None), (where, "background")]
        else:
            chunks = [(where, "background"), (", " if r.random() < 0.7 else " ", None), *body]
        if r.random() < 0.18:
            chunks = [(r.choice(OPENINGS) + " ", None), *chunks]
        if r.random() < 0.12:
            chunks.append((".", None))
        if r.random() < 0.15:
            chunks = [(chunks[0][0].capitalize(), chunks[0][1]), *chunks[1:]]
        return chunks

    def _canonical_chunks(self, scene: Scene) -> Chunks:
        joins = [" and " if rel is None else f" {RELATION_WORDS[rel][0]} " for rel in scene.relations]
        if joins == [" and ", " and "]:
            joins[0] = ", "
        chunks: Chunks = [(_canonical_thing(scene.things[0]), 0)]
        for i, thing in enumerate(scene.things[1:]):
            chunks += [(joins[i], i), (_canonical_thing(thing), i + 1)]
        if scene.background != "white" or self._random.random() < 0.35:
            chunks += [(" ", None), (f"on {with_article(scene.background)} background", "background")]
        return chunks

    def _body(self, scene: Scene) -> Chunks:
        chunks: Chunks = [(self._thing(scene.things[0]), 0)]
        for i, thing in enumerate(scene.things[1:]):
            is_last = i + 2 == len(scene.things)
            chunks += [(self._join(scene.relations[i], i, is_last), i), (self._thing(thing), i + 1)]
        return chunks

    def _join(self, relation: str | None, i: int, is_last: bool) -> str:
        r = self._random
        if relation is None:
            choices = (" and ", " and ", " next to ", " with ", " beside ", ", ") if is_last else (", ", " and ")
            return r.choice(choices)
        words = r.choice(RELATION_WORDS[relation])
        if i == 0:
            return f" {r.choice(COPULAS)} {words} " if r.random() < 0.25 else f" {words} "
        link = r.choice(("and ", "and ", r.choice(LINKS) + " "))
        return f"{'' if link.startswith(',') else ' '}{link.strip()} {words} ".replace("  ", " ")

    def _thing(self, thing: Thing) -> str:
        r = self._random
        size = r.choice(SIZE_WORDS[thing.size])
        if thing.size == "medium" and r.random() < 0.75:
            size = ""
        elif r.random() < 0.5:
            size = thing.size
        colour = thing.colour
        if colour and r.random() >= 0.6:
            colour = r.choice(COLOUR_WORDS[colour])
        shape = thing.shape if r.random() < 0.6 else r.choice(SHAPE_WORDS[thing.shape])
        words = [size, colour] if r.random() < 0.9 else [colour, size]
        if r.random() < 0.1:
            words.insert(r.randint(0, 2), self._unknown_word())
        phrase = " ".join(word for word in (*words, shape) if word)
        style = r.random()
        if style < 0.8:
            return with_article(phrase)
        return phrase if style < 0.9 else f"{r.choice(('the', 'one'))} {phrase}"

    def _unknown_word(self) -> str:
        r = self._random
        if r.random() < 0.6:
            return r.choice(NEUTRAL_WORDS)
        return "".join(r.choice(LETTERS) for _ in range(r.randint(3, 9)))

    def _background(self, background: str) -> str:
        r = self._random
        word = background if r.random() < 0.6 else r.choice(BACKGROUND_WORDS[background])
        frame = BACKGROUND_FRAMES[0] if r.random() < 0.5 else r.choice(BACKGROUND_FRAMES)
        return frame.format(a=with_article(word) if r.random() < 0.85 else f"the {word}", b=word)


class PartialCaptionWriter(CaptionWriter):
    """Some captions say less than the scene holds, for a model that is guided away from a negative prompt.

    The empty one is what guidance leads away from by default; one without colours leaves them open; fragments such as
    `blue` or `large, star` are what negative prompts look like.
    """

    EMPTY, COLOURLESS, FRAGMENTS = 0.10, 0.08, 0.08

    def chunks(self, scene: Scene) -> Chunks:
        kind = self._random.random()
        if kind < self.EMPTY:
            return [("", None)]
        if kind < self.EMPTY + self.COLOURLESS:
            return super().chunks(replace(scene, things=tuple(replace(thing, colour="") for thing in scene.things)))
        if kind < self.EMPTY + self.COLOURLESS + self.FRAGMENTS:
            return self._fragments(scene)
        return super().chunks(scene)

    def _fragments(self, scene: Scene) -> Chunks:
        """One fragment, at times two."""
        chunks = [self._fragment(scene)]
        if self._random.random() < 0.25:
            chunks += [(", ", None), self._fragment(scene)]
        return chunks

    def _fragment(self, scene: Scene) -> tuple[str, int | str]:
        """A thing's colour, shape, size or colour and shape, or the background."""
        r = self._random
        i = r.randrange(len(scene.things))
        thing, kind = scene.things[i], r.choice(("colour", "colour", "shape", "size", "look", "background"))
        if kind == "background":
            return f"{r.choice(BACKGROUND_WORDS[scene.background])} background", "background"
        colour, shape = r.choice(COLOUR_WORDS[thing.colour]), r.choice(SHAPE_WORDS[thing.shape])
        words = {
            "colour": colour,
            "shape": shape,
            "size": r.choice(SIZE_WORDS[thing.size]),
            "look": f"{colour} {shape}",
        }
        return words[kind], i

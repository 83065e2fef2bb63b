"""A prompt as a language model reads it: put into the form of a chat, then cut into tokens, by the checkpoint's own
tokenizer files. Engine and workers read prompts by the same code, so that the engine knows how many rows a text has.

No torch. The form is the family's, what its pipeline makes of a prompt by the checkpoint's chat template. A template is
a program, and none of a checkpoint's is run: it only must have all marks of the form.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from tetrion.engine.errors import shown
from tetrion.engine.families.files import MAX_BYTES, fault, read_file, read_object
from tetrion.engine.families.hash_tokens import HashTokenizer
from tetrion.engine.families.plan import some_of
from tetrion.engine.families.tokenizers import TOKENIZER_CONFIG, WHOLE, has_vocabulary

CACHED_TOKENIZERS = 8
CHARS_PER_TOKEN = 16
"""Of a prompt that is longer than so many for each token that the encoder takes, only the beginning is read: the
engine's loop waits for it. Texts have about 4."""
TEMPLATE_FILE = "chat_template.jinja"
MARK = re.compile(r"<\|[^<>]+\|>|</?think>|\[/?[A-Z_]+\]")
"""What templates spell out; a text's ends they have as variables."""


class ChatForm(NamedTuple):
    """A user's message and what stands around it. `left_out`: of a prompt. `has_ends`: what marks a text's beginning
    and end is part of the form, else the tokenizer adds it."""

    before: str
    after: str
    left_out: str | None = None
    has_ends: bool = False

    def of(self, prompt: str) -> str:
        own = prompt if self.left_out is None else prompt.replace(self.left_out, "")
        return f"{self.before}{own}{self.after}"

    @property
    def marks(self) -> frozenset[str]:
        return frozenset(MARK.findall(self.of("")))


DESCRIBED = ChatForm(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
"""Qwen-Image's and Krea 2's."""
NUM_BEFORE_DESCRIBED = 34
"""Tokens in front of its prompt."""


class Prompt(NamedTuple):
    """`ids`: at most as many as the encoder takes; `num_tokens`: before that, of what was read."""

    ids: list[int]
    num_tokens: int


class PromptReader:
    """Prompts of one model."""

    def __init__(
        self,
        tokenizer: Path,
        form: ChatForm,
        vocab_size: int,
        max_tokens: int,
        num_dropped: int = 0,
        keeps_end: bool = False,
    ) -> None:
        """`tokenizer`: the component's folder; one without a vocabulary (for `dummy`) makes a token of each word.
        `padding`: the id of what fills a text up, `pads_left`: in front of it, by the config. `num_dropped`: of how
        many of the form's first tokens nothing is kept once they are encoded; they are among `max_tokens`. `keeps_end`:
        a prompt that is too long is cut in front of what the form has behind it. Raises CheckpointError for a
        vocabulary that cannot be used."""
        self.form, self.max_tokens, self.num_dropped = form, max_tokens, num_dropped
        self._words = None if has_vocabulary(tokenizer) else HashTokenizer(vocab_size, end=vocab_size - 1)
        self._tokenizer = load_tokenizer(tokenizer) if self._words is None else None
        self._end = (
            self._tokenizer.encode(form.after, add_special_tokens=False).ids
            if keeps_end and self._tokenizer is not None
            else []
        )
        self.padding, self.pads_left = (0, False) if self._tokenizer is None else _padding(tokenizer, self._tokenizer)

    def read(self, prompt: str) -> Prompt:
        prompt = prompt[: CHARS_PER_TOKEN * self.max_tokens]
        if self._tokenizer is not None:
            ids = self._tokenizer.encode(self.form.of(prompt), add_special_tokens=not self.form.has_ends).ids
            if len(ids) > self.max_tokens:
                return Prompt(ids[: self.max_tokens - len(self._end)] + self._end, len(ids))
            return Prompt(ids, len(ids))
        assert self._words is not None
        form, num_tokens = [0] * self.num_dropped, self._words.num_tokens(prompt)
        words = self._words.ids(prompt, min(num_tokens, self.max_tokens - len(form)))
        return Prompt(form + words, len(form) + num_tokens)

    def num_rows(self, prompt: str) -> int:
        """Of the text that steps see: what is dropped in front is none of it."""
        return len(self.read(prompt).ids) - self.num_dropped


def check_template(folder: Path, form: ChatForm) -> None:
    """Raises CheckpointError if the tokenizer's chat template is of another kind; OSError."""
    path, template = folder / TEMPLATE_FILE, None
    if path.is_file():
        template = read_file(path).decode(errors="replace")
    else:
        path = folder / TOKENIZER_CONFIG
        template = read_object(path).get("chat_template")
    if not isinstance(template, str):
        raise fault(folder, f" has no chat template: neither {TEMPLATE_FILE}, nor one in {TOKENIZER_CONFIG}")
    if missing := form.marks - {mark for mark in form.marks if mark in template}:
        raise fault(path, f": its chat template has no {some_of(missing)}: it is not that of the family")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises CheckpointError if the folder holds none that can be used; OSError."""
    path = folder / WHOLE
    state = path.stat()
    if state.st_size > MAX_BYTES:
        raise fault(path, f" is larger than {MAX_BYTES:,} bytes, which no such file is")
    return _load(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(CACHED_TOKENIZERS)
def _load(path: Path, mtime_ns: int, num_bytes: int) -> Tokenizer:
    """As the file is now."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare exceptions, and panics, which are none
        raise fault(path, f" holds no usable tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _padding(folder: Path, tokenizer: Tokenizer) -> tuple[int, bool]:
    config = read_object(folder / TOKENIZER_CONFIG)
    token = config.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise fault(folder / TOKENIZER_CONFIG, f": pad_token {shown(token)} is not in the vocabulary")
    return found, config.get("padding_side") == "left"

"""The two tokenizers of the embedded model, built from the captions' vocabulary, without training data.

T5 class: a unigram model of whole words with single characters to fall back on, so any word has ordinary tokens.
CLIP class: byte-level byte-pair encoding whose merges (`clip_merges.txt`) make the captions' words whole.
"""

import itertools
import string
from collections.abc import Sequence
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

from benchmarks.embedded_model.captions import vocabulary

CLIP_MAX_TOKENS = 77
T5_MAX_TOKENS = 512
MERGES = Path(__file__).with_name("clip_merges.txt")
COMMON_WORDS = [
    "it",
    "this",
    "that",
    "is",
    "are",
    "was",
    "be",
    "has",
    "have",
    "for",
    "from",
    "at",
    "by",
    "as",
    "or",
    "not",
    "no",
    "but",
    "so",
    "very",
    "more",
    "most",
    "some",
    "any",
    "all",
    "each",
    "you",
    "i",
    "we",
    "they",
    "he",
    "she",
    "my",
    "your",
    "our",
    "cat",
    "dog",
    "house",
    "tree",
    "sun",
    "moon",
    "sky",
    "water",
    "man",
    "woman",
    "car",
    "flower",
    "bird",
    "fish",
    "dark",
    "light",
    "bright",
    "pale",
    "deep",
    "two",
    "three",
    "four",
    "centre",
    "center",
    "middle",
    "top",
    "bottom",
    "corner",
    "inside",
    "outside",
    "between",
    "near",
    "far",
    "behind",
    "around",
    "picture",
    "scene",
    "art",
    "style",
    "modern",
    "painting",
    "rectangle",
    "oval",
    "hexagon",
    "line",
    "black",
    "gold",
    "silver",
]


def t5_tokenizer(more_words: Sequence[str] = ()) -> T5Tokenizer:
    """Words (also capitalised) score above characters, so the unigram model takes a known word whole.

    `more_words` (lower case) come last, so that every id is what it is without them.
    """
    words = sorted({*vocabulary(), *COMMON_WORDS})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{form}", -3.0) for word in words for form in (word, word.capitalize())]
    pieces += [(character, -8.0) for character in string.ascii_letters + string.digits + string.punctuation]
    pieces += [(f"▁{form}", -3.0) for word in more_words for form in (word, word.capitalize())]
    seen: dict[str, float] = {}
    for piece, score in pieces:
        seen.setdefault(piece, score)
    options = {"do_lower_case": True}  # as CLIP's does: a word in capitals would be read letter by letter
    return T5Tokenizer(vocab=list(seen.items()), extra_ids=0, model_max_length=T5_MAX_TOKENS, **options)


def clip_tokenizer(more_words: Sequence[str] = ()) -> CLIPTokenizer:
    """All 256 bytes, each also at a word's end, plus merges for the known words.

    Merges and ids for `more_words` (lower case) come last, so that captions have the ids that they have without them.
    """
    merges = clip_merges()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{character}</w>" for character in alphabet)]
    tokens += [a + b for a, b in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    merges += _merges_of(more_words, merges)
    tokens = [*dict.fromkeys([*tokens, *(a + b for a, b in merges)])]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_MAX_TOKENS)


def clip_merges() -> list[tuple[str, str]]:
    """Those of byte-pair encoding trained once on the captions' words, in order of priority. They are kept in a file,
    since training them again orders ties by chance, and an embedded CLIP knows words by these ids."""
    lines = MERGES.read_text(encoding="utf-8").splitlines()
    return [(a, b) for a, _, b in (line.partition(" ") for line in lines)]


def _merges_of(words: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that make these words whole where the others leave pieces of them, from the left to the right."""
    rank = {merge: i for i, merge in enumerate(merges)}
    added: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pairs = [*itertools.pairwise(pieces)]
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                rank[best] = len(rank)
                added.append(best)
            i = pairs.index(best)
            pieces[i : i + 2] = ["".join(best)]
    return added

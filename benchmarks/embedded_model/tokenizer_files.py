"""The two tokenizers of the embedded model, built from the captions' vocabulary, without training data.

T5 class: a unigram model of whole words with single characters to fall back on, so any word has ordinary tokens.
CLIP class: byte-level byte-pair encoding whose merges make the captions' words whole.
"""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from benchmarks.embedded_model.captions import vocabulary

CLIP_MAX_TOKENS = 77
T5_MAX_TOKENS = 512
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


def t5_tokenizer() -> T5Tokenizer:
    """Words (also capitalised) score above characters, so the unigram model takes a known word whole."""
    words = sorted({*vocabulary(), *COMMON_WORDS})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{form}", -3.0) for word in words for form in (word, word.capitalize())]
    pieces += [(character, -8.0) for character in string.ascii_letters + string.digits + string.punctuation]
    seen: dict[str, float] = {}
    for piece, score in pieces:
        seen.setdefault(piece, score)
    options = {"do_lower_case": True}  # as CLIP's does: a word in capitals would be read letter by letter
    return T5Tokenizer(vocab=list(seen.items()), extra_ids=0, model_max_length=T5_MAX_TOKENS, **options)


def clip_tokenizer() -> CLIPTokenizer:
    """All 256 bytes, each also at a word's end, plus merges for the known words."""
    words = sorted({*vocabulary(), *COMMON_WORDS})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator(words, trainer)
    merges = bpe_merges(bpe)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{character}</w>" for character in alphabet)]
    tokens += [a + b for a, b in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_MAX_TOKENS)


def bpe_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merge rules of a trained byte-pair encoding, in order of priority."""
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]

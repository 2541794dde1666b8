"""open_clip's own tokenizer, with the same tokens for every caption in less time and in bounded memory.

A third of the time per caption goes into repairing text that has nothing to repair, and most of the rest into work that is
the same for every occurrence of a word. The tokenizer itself remembers every word it ever saw; over hundreds of millions of
captions those are names, numbers and misspellings without end, in every worker.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from open_clip import SimpleTokenizer
from open_clip.tokenizer import get_clean_fn

Tokenizer = Callable[[list[str]], torch.Tensor]
REMEMBERED_WORDS = 100_000
LONGEST_REMEMBERED = 40  # characters


def quick_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the same results: a quicker one where there is one, else the one given."""
    if type(tokenizer) is SimpleTokenizer and tokenizer.reduction_fn is None and tokenizer.context_length >= 2:
        return QuickTokenizer(tokenizer)
    return tokenizer


class QuickTokenizer:
    """Tokens of whole words are remembered, plain text is not repaired, and a caption is read only as far as it counts."""

    def __init__(self, tokenizer: SimpleTokenizer) -> None:
        """tokenizer: one that cuts long captions off at its context length."""
        self.tokenizer = tokenizer
        self._only_lowers = tokenizer.clean_fn is get_clean_fn("lower")
        self._words: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """[B, L] int64: start, the caption's first tokens, end, zeros."""
        length = self.tokenizer.context_length
        result = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(result, texts):
            tokens = self._tokens(text, length - 2)
            row[0] = self.tokenizer.sot_token_id
            row[1 : len(tokens) + 1] = tokens
            row[len(tokens) + 1] = self.tokenizer.eot_token_id
        return torch.from_numpy(result)

    def _tokens(self, text: str, most: int) -> list[int]:
        tokens: list[int] = []
        for word in self.tokenizer.pat.findall(self._clean(text)):
            known = self._words.get(word)
            tokens += self._look_up(word) if known is None else known
            if len(tokens) >= most:
                return tokens[:most]
        return tokens

    def _clean(self, text: str) -> str:
        # Of ASCII, repairing changes html's entities, control characters and line breaks alone.
        if self._only_lowers and text.isascii() and text.isprintable() and "&" not in text:
            return " ".join(text.split()).lower()
        return self.tokenizer.clean_fn(text)

    def _look_up(self, word: str) -> list[int]:
        own = self.tokenizer
        spelled = "".join(own.byte_encoder[byte] for byte in word.encode("utf-8"))
        # What it remembers from the start are the special tokens, which are not to be taken apart.
        remembered = spelled in own.cache
        tokens = [own.encoder[part] for part in own.bpe(spelled).split(" ")]
        if not remembered:
            own.cache.pop(spelled, None)
        if len(self._words) >= REMEMBERED_WORDS:
            self._words.clear()  # What is frequent is back within a few batches.
        if len(word) <= LONGEST_REMEMBERED:
            self._words[word] = tokens
        return tokens

"""The quick tokenizer gives open_clip's tokens for every caption, and remembers a bounded number of words."""

from __future__ import annotations

import random
import string

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from training.data import tokens
from training.data.tokens import QuickTokenizer, quick_tokenizer

ODD = [
    "",
    " ",
    "a photo of a cat",
    "A Photo Of A CAT's hat, isn't it? We'll see: they'd I'm you're I've",
    "tabs\tand\nlines\r\nand\x0bothers\x0c",
    "control \x00\x01\x07\x1b[31mred\x1b[0m \x7f characters",
    "entities &amp; &lt;b&gt; &amp;amp; &eacute; &#39; &#x1F600; &nosuch; & alone &copy",
    "<b>tags</b> &lt; kept &amp;",
    "na\u00efve caf\u00e9 cafe\u0301 \u00dcBER \u0130stanbul \u1e9e",
    "mojibake \u00e2\u20ac\u2122 \u00c3\u00a9 \u00e2\u0153\u201d schÃ¶n",
    "quotes \u2018single\u2019 \u201cdouble\u201d \u00ab\u00bb",
    "ligatures \ufb01 \ufb02 full width \uff21\uff22\uff23",
    "emoji 😀👩‍👩‍👧 🇫🇷 flags ✔️",
    "日本語のテキスト 한국어 русский العربية हिन्दी ไทย",
    "zero\u200bwidth \u200d joiner \ufeff mark \u00ad hyphen \u2028 line \u2029 paragraph \x85",
    "lone \ud800 surrogate".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    "numbers 1 22 333 4,444.55 1/2 ½ ² ٣",
    "<start_of_text> inside <end_of_text> <START_OF_TEXT>",
    "punctuation!!! ... --- ?!?! ((())) [x] {y} ~`@#$%^*_+=|\\/'\";:",
    "underscore_word CamelCase http://example.com/a?b=c&d=e",
    "word " * 200,
    "x" * 300,
    "supercalifragilisticexpialidocious" * 5,
    "a " * 74,
    "a " * 75,
    "a " * 76,
    "a " * 77,
]


def random_captions(count: int) -> list[str]:
    rng = random.Random(0)
    alphabets = [
        string.ascii_letters + "     ",
        string.printable,
        string.ascii_lowercase + " &;#<>'\"",
        "".join(map(chr, range(0x80, 0x250))) + " ",
        "".join(map(chr, range(0x2000, 0x2070))) + " ab",
        "".join(map(chr, range(0x4E00, 0x4E20))) + "😀🎉é ",
    ]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(60))) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [{}, {"context_length": 12}, {"context_length": 2}, {"clean": "canonicalize"}, {"clean": "whitespace"}],
    ids=str,
)
def test_tokens_are_the_same_for_every_caption(options: dict) -> None:
    quick, plain = quick_tokenizer(SimpleTokenizer(**options)), SimpleTokenizer(**options)
    assert isinstance(quick, QuickTokenizer)
    captions = ODD + random_captions(300)
    expected = plain(captions)
    for _ in range(2):  # the second time from memory
        found = quick(captions)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED_WORDS", 50)
    own, plain = SimpleTokenizer(), SimpleTokenizer()
    special = dict(own.cache)
    quick = QuickTokenizer(own)
    for captions in ([caption] for caption in ODD + random_captions(200)):
        assert torch.equal(quick(captions), plain(captions))
        assert len(quick._words) <= 50
        assert all(len(word) <= tokens.LONGEST_REMEMBERED for word in quick._words)
    assert own.cache == special
    assert len(plain.cache) > 200  # what would grow without end


def test_any_other_tokenizer_is_left_alone() -> None:
    class Own(SimpleTokenizer):
        """One with ideas of its own."""

    for tokenizer in (Own(), SimpleTokenizer(reduction_mask="simple"), lambda texts: torch.zeros(len(texts), 3)):
        assert quick_tokenizer(tokenizer) is tokenizer
    assert isinstance(quick_tokenizer(open_clip.get_tokenizer("ViT-B-32")), QuickTokenizer)

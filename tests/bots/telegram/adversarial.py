"""Texts that a model could write and that break bots: broken Markdown, right-to-left, emoji families, nested code."""

from __future__ import annotations

import random

_FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
_MARKUP = r"""**bold|bold**|*|_|__|`|``|```|~~~|[x](|](http://a.b)|[link](https://example.org/a_b?c=d)|![img](http://x.y/z.png)
|# |> |- item|1. one|<b>html</b>|<script>alert(1)</script>|&amp;|&#x202e;|\*|\|$$x^2$$|\(a\)|~~gone~~|***three***
|`` a`b ``|<!-- c -->|<a href='x'>y</a>|@channel|/stop|http://bare.example/path_with_under|word|a sentence of words. """
_BLOCKS = (
    "\n## Head\n", "\n> quote\n", "\n1. one\n2. two\n", "\n| a | b |\n|---|---|\n| 1 | 中文 |\n", "\n---\n", "\n\n\n\n",
    "```python\nprint('a')\n```", "~~~\ncode\n~~~", "    indented\n", "\t", "  \n", "|", "||spoiler||", "x" * 70,
)  # fmt: skip
_SCRIPTS = (
    _FAMILY, "\U0001f44d\U0001f3fd", "\U0001f1f8\U0001f1ea", "e\u0301", "a\u0308\u0308\u0308", "עברית", "مرحبا بالعالم",
    "\u202egnirts\u202c", "ประเทศไทย", "한국어", "漢字かな。", "\x00", "\x07", "\u200b", "\ufeff",
    "\U0001d4b3",
)  # fmt: skip
_PIECES = (*_MARKUP.replace("\n", "").split("|"), *_BLOCKS, *_SCRIPTS)
_ALONE = (
    "*",
    "`",
    "```",
    "\n\n",
    "\u200b",
    "﷽" * 3000,
    _FAMILY * 900,
    f"```\n{'line of code' * 900}\n```",
    "x" * 20_000,
)


def texts(count: int, seed: int) -> list[str]:
    """Every 25th is 20,000 characters long; the first are nothing but one kind of trouble."""
    draw = random.Random(seed)
    made = list(_ALONE)
    while len(made) < count:
        length = 20_000 if len(made) % 25 == 0 else draw.randrange(1, 600)
        text = ""
        while len(text) < length:
            text += draw.choice(_PIECES) + draw.choice(("", " ", " ", "\n"))
        made.append(text[:length])
    return made

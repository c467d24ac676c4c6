"""Whatever a model writes arrives whole: within Telegram's limits, with entities where they belong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bots.telegram.sending import text as texts
from core.engine.protocol import Request
from tests.bots.telegram.adversarial import texts as adversarial
from tests.bots.telegram.talk import ANN, talk
from tests.fakes.telegram.people import units
from tests.fakes.telegram.rules import check_text

pytestmark = pytest.mark.slow

_PRINTED = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\u202d\u202e]")


def squeezed(text: str) -> str:
    """What is to be seen of a text, without the spaces."""
    return "".join(_PRINTED.findall(text))


@pytest.mark.parametrize("number", range(4))
async def test_500_adversarial_texts_are_all_delivered_whole(tmp_path: Path, number: int) -> None:
    given = adversarial(500, seed=20261124)[number::4]

    def answer(request: Request) -> str:
        return given[int(request.messages[-1].text)]

    async with talk(tmp_path, answer, transport="edit" if number % 2 else "draft") as it:
        await it.here.database.write(lambda tx: tx.run("UPDATE channel SET tokens_out = 100000, tokens_in = 0"))
        for at, text in enumerate(given):
            before = len(it.there.held(ANN.id))
            it.there.says(ANN, "/new")
            it.there.says(ANN, str(at))
            await it.settled()
            parts = it.there.held(ANN.id)[before + 1 :]
            whole = texts.render(text.strip()).text
            if squeezed(text):
                assert squeezed("".join(part.text for part in parts)) == squeezed(whole), text
                assert parts[-1].labels[-1] == "👎"
            else:
                assert parts[-1].text.strip()
            for part in parts:
                check_text(part.texts[-1], part.entities)
        refused = [call for call in it.there.calls if call.status == 400]
        assert not refused, refused[:3]


def test_what_it_looks_like() -> None:
    shown = texts.render(
        "# Head\n\nA **bold *both* x** `code` [link](http://a.b) ~~s~~\n\n- a\n  - b\n\n> q\n\n```py\nx=1\n```"
    )
    assert shown.text == "Head\n\nA bold both x code link s\n\n• a\n  • b\n\nq\n\nx=1"
    kinds = {(mark.kind, shown.text[mark.start : mark.end]) for mark in shown.marks}
    assert kinds == {
        ("bold", "Head"), ("bold", "bold both x"), ("italic", "both"), ("code", "code"), ("text_link", "link"),
        ("strikethrough", "s"), ("blockquote", "q"), ("pre", "x=1"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("markdown", "bold"),
    [
        ("申请需要三步：**第一步：**提交表格。**“第二步”**等待审核。", ["第一步：", "“第二步”"]),
        ("这是**重点。**后面，**《办法》**第三条", ["重点。", "《办法》"]),
        ("**API（v2）**is open", ["API（v2）"]),
        ("これは**「許可」**です", ["「許可」"]),
        ('2 ** 3, a**"b"**c, **Note:**x, 一 ** 二', []),
        ("a **b:** c", ["b:"]),
    ],
)
def test_stars_beside_chinese_need_no_spaces_and_elsewhere_are_commonmarks(markdown: str, bold: list[str]) -> None:
    shown = texts.render(markdown)
    assert [shown.text[mark.start : mark.end] for mark in shown.marks] == bold
    assert ("*" in shown.text) == (not bold)


@pytest.mark.parametrize(
    "formula",
    [
        r"The roots are \( x_{1,2} = \frac{-b \pm \sqrt{b^2-4ac}}{2a} \) and",
        "\\[\n\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}\n\\]",
        r"so $x^{*} + y^{*} = \{1, 2\}$ holds, and $a*b*c$ too",
        "$$a_{i}*b_{j}*c$$",
        "\\[\n- a + b\n+ c * d\n= 1. e\n\\]",
        "It is\n\n$$\n# x \\\\\n> y_1\n---\n$$",
        "\\[ f(x) =\n  1. x\n  - y \\].",
    ],
)
def test_a_formula_stands_as_it_is_written(formula: str) -> None:
    assert texts.render(formula) == texts.RenderedText(formula)


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("$5 and **both** for $10", "$5 and both for $10"),
        ("US$5 **or** 4$", "US$5 or 4$"),
        ("5$ *a* $", "5$ a $"),
        ("$5, **or** $10", "$5, or $10"),
        (r"\( **open**", "( open"),
        (r"\\( **x** \\)", r"\( x \)"),
    ],
)
def test_prices_and_what_is_never_closed_are_no_formulas(markdown: str, text: str) -> None:
    shown = texts.render(markdown)
    assert (shown.text, len(shown.marks)) == (text, 1)


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("- so\n  \\[\n  - x\n    - y\n  \\]\n- then", "• so\n  \\[\n  - x\n    - y\n  \\]\n• then"),
        ("> $$\n> - a\n> $$", "$$\n- a\n$$"),
        ("\\[\n- a\n\\]\n- b", "\\[\n- a\n\\]\n\n• b"),
        ("\\[ *never* closed\n- a", "[ never closed\n\n• a"),
        ("> \\[\n- a\n\\]", "[\n\n• a\n  ]"),
        ("\\[\n\n- a\n\n\\]", "[\n\n• a\n\n]"),
        ("```\n\\[\n```\n- a", "\\[\n\n• a"),
    ],
)
def test_a_formula_of_several_lines_ends_with_what_it_stands_in(markdown: str, text: str) -> None:
    assert texts.render(markdown).text == text


def test_a_link_whose_text_is_another_address_shows_its_own() -> None:
    shown = texts.render("[https://bank.example](https://evil.example/x) and [bank](https://bank.example)")
    assert shown.text == "https://bank.example (https://evil.example/x) and bank"


def test_a_table_keeps_the_addresses_of_its_links_and_pictures() -> None:
    cells = "| [form](https://acme.example/f.pdf) | ![plan](https://acme.example/p.png) | <https://a.example> |"
    shown = texts.render(f"| a | b | c |\n|---|---|---|\n{cells}").text
    kept = ["form (https://acme.example/f.pdf)", "plan (https://acme.example/p.png)", "https://a.example"]
    assert shown.splitlines()[-1].split(" │ ") == kept


def test_html_and_commands_stay_as_they_were_written() -> None:
    assert texts.render("Use <div> & <b>x</b>, not a_b_c").text == "Use <div> & <b>x</b>, not a_b_c"
    assert texts.render("| a | b |\n|---|---|\n| 1 | 中文 |").text == "a │ b\n──┼─────\n1 │ 中文"


def test_a_code_block_that_fits_is_not_cut() -> None:
    code = "```\n" + "line of code\n" * 200 + "```"
    parts = texts.split(texts.render("word " * 500 + "\n\n" + code + "\n\nend"))
    assert [sum(mark.kind == "pre" for mark in part.marks) for part in parts] == [0, 1]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400), st.integers(40, 120))
def test_parts_are_the_text_and_no_entity_is_out_of_bounds(text: str, limit: int) -> None:
    whole = texts.render(text)
    parts = texts.split(whole, limit)
    assert squeezed("".join(part.text for part in parts)) == squeezed(whole.text)
    for part in parts:
        assert units(part.text) <= limit
        check_text(part.text, part.entities(), limit=limit)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab *_`~[](#>-\n|😀", max_size=300))
def test_heads_and_tails_fit(text: str) -> None:
    whole = texts.render(text)
    for shown in (texts.head(whole, 60), texts.tail(whole, 60), texts.first_line(text, 60)):
        check_text(shown.text, shown.entities(), empty=True, limit=64)

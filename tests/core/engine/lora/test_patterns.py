"""Strangers' regular expressions: the same answers as Python's, without the years that Python's may take."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.lora.patterns import Expression

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj"
    r"|gate_proj|up_proj|down_proj|proj|linear).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp"
    r"|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|proj|linear)))"
)
ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", r"\b", "^", "$", r"\Z", r"\W"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: f"(?:{'|'.join(some)})"),
        inner.map(lambda one: f"({one})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{2,}"])).map(
            lambda made: f"(?:{made[0]}){made[1]}"
        ),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, st.lists(st.text("ab1._", max_size=7), min_size=1, max_size=5))
def test_it_says_what_fullmatch_says(text: str, words: list[str]) -> None:
    mine = Expression(text)
    for word in words:
        assert mine.matches(word) == (re.fullmatch(text, word) is not None), (text, word)


@pytest.mark.parametrize(
    ("module", "meant"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.29.mlp.down_proj", True),
        ("base.text_model.layers.3.mlp.linear", True),
        ("model.layers.x.self_attn.q_proj", False),
        ("model.layers.1.self_attn.rotary", False),
        ("lm_head", False),
    ],
)
def test_what_unsloth_writes_is_read(module: str, meant: bool) -> None:
    assert Expression(UNSLOTH).matches(module) is meant is (re.fullmatch(UNSLOTH, module) is not None)


@pytest.mark.parametrize(
    "text", ["(a*)*b", "(a|a)*b", "(.*)*x", ".*.*.*.*.*.*.*.*.*.*=", "(?:a?){40}a{40}", "((a+)+)+$"]
)
def test_what_python_would_take_years_for_is_answered(text: str) -> None:
    assert Expression(text).matches("a" * 200 + "!") is False


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(q_proj", "not a regular expression"),
        ("*", "not a regular expression"),
        (r"(a)\1", "groupref is not supported"),
        ("(?=a)a", "assert is not supported"),
        ("(?!a)b", "assert not is not supported"),
        ("(?i)a", "it has flags"),
        ("(?>a)", "atomic group is not supported"),
        ("a{1,1000000}", "too large"),
        ("((a{1,100}){1,100}){1,100}", "too large"),
        ("(?:){9999999}", "too large"),
        ("a" * 20_000, "longer than"),
        ("(" * 4000 + "a" + ")" * 4000, "nested too deeply"),
    ],
)
def test_what_needs_going_back_or_too_much_room_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Expression(text)

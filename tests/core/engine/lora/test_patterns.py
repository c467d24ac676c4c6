"""Foreign regular expressions: the answers of Python's `re`, in linear time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.lora.patterns import compile_pattern

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj"
    r"|gate_proj|up_proj|down_proj|proj|linear).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp"
    r"|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|proj|linear)))"
)
ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", r"\b", "^", "$", r"\W"])
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
def test_fullmatch_agrees_with_pythons(text: str, words: list[str]) -> None:
    pattern = compile_pattern(text)
    for word in words:
        assert (pattern.fullmatch(word) is None) == (re.fullmatch(text, word) is None), (text, word)


def test_the_pattern_that_unsloth_writes_matches_the_same_modules() -> None:
    modules = {
        "model.layers.0.self_attn.q_proj": True,
        "model.layers.29.mlp.down_proj": True,
        "base.text_model.layers.3.mlp.linear": True,
        "model.layers.x.self_attn.q_proj": False,
        "model.layers.1.self_attn.rotary": False,
        "lm_head": False,
    }
    assert {name: compile_pattern(UNSLOTH).fullmatch(name) is not None for name in modules} == modules
    assert {name: re.fullmatch(UNSLOTH, name) is not None for name in modules} == modules


def test_patterns_that_would_backtrack_for_years_are_answered() -> None:
    for text in ("(a*)*b", "(a|a)*b", "(.*)*x", ".*.*.*.*.*.*.*.*.*.*=", "(?:a?){40}a{40}", "((a+)+)+$"):
        assert compile_pattern(text).fullmatch("a" * 200 + "!") is None


@pytest.mark.parametrize(
    ("reason", "texts"),
    [
        ("not a regular expression", ["(q_proj", "*"]),
        (
            "linear time",
            [r"(a)\1", "(?=a)a", "(?!a)b", "(?>a)", "(?x) a", r"a\Z", "[a[:alpha:]]", "a{,3}", "a{1,1000000}"],
        ),
        ("too large", [".{1,1000}.{1,1000}.{1,1000}", "a" * 20_000, "(" * 4000 + "a" + ")" * 4000]),
    ],
)
def test_patterns_without_a_linear_bound_are_refused(reason: str, texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(ValueError, match=reason):
            compile_pattern(text)

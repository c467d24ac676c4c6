"""Emitted text: whole characters, never part of a stop string, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from core.engine.scheduling.detokenizer import Detokenizer, StopScanner
from tests.support.tiny import tiny_tokenizer

BYTES = tiny_tokenizer()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a leading space, bytes as fallback, and a decoder that drops the first space, as Llama 2 has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁the", "▁a", "b", "é", "▁▁"]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[1:3]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


SENTENCES = sentencepiece_like()


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> tuple[list[str], str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(i) for i in ids], detokenizer.flush()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd<")))
def test_byte_tokens_come_out_as_the_same_text_character_by_character(text: str) -> None:
    shown, rest = pieces_of(BYTES, BYTES.encode(text, add_special_tokens=False))
    assert [piece for piece in shown if piece] == list(text)
    assert rest == ""


@pytest.mark.parametrize("tokenizer", [BYTES, SENTENCES], ids=["bytes", "sentencepiece"])
@given(st.data())
def test_joined_pieces_are_the_decoded_whole_for_any_tokens(
    tokenizer: PreTrainedTokenizerFast, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    shown, rest = pieces_of(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # Byte fallback turns a whole run of bytes into marks as soon as one is wrong, also what was right until then.
    if "\ufffd" not in whole or tokenizer is BYTES:
        assert ("".join(shown) + rest).rstrip("\ufffd") == whole.rstrip("\ufffd")


def test_an_emoji_of_four_tokens_is_shown_at_its_last_one() -> None:
    shown, rest = pieces_of(BYTES, BYTES.encode("a🙂", add_special_tokens=False))
    assert (shown, rest) == (["a", "", "", "", "🙂"], "")


def test_a_cut_character_is_left_out() -> None:
    shown, rest = pieces_of(BYTES, BYTES.encode("a🙂", add_special_tokens=False)[:-1])
    assert ("".join(shown), rest) == ("a", "")


def test_the_first_space_of_a_sentencepiece_answer_is_dropped_and_the_others_kept() -> None:
    ids = SENTENCES.convert_tokens_to_ids(["▁the", "▁a", "▁", "▁a"])
    assert pieces_of(SENTENCES, ids) == (["the", " a", " ", " a"], "")


def scan(stops: list[str], pieces: list[str]) -> tuple[str, bool, list[str]]:
    scanner = StopScanner(stops)
    shown = [scanner.push(piece) for piece in pieces]
    return "".join(shown) + scanner.flush(), scanner.hit, shown


SHORT = st.text("ab\n", min_size=1, max_size=4)


@given(st.lists(SHORT, max_size=3), st.lists(st.text("ab\n", max_size=3), max_size=12))
def test_the_cut_into_pieces_does_not_matter(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert scan(stops, pieces)[:2] == scan(stops, list(text))[:2] == scan(stops, [text])[:2]


@given(st.lists(SHORT, min_size=1, max_size=3), st.lists(st.text("ab\n", max_size=3), max_size=12))
def test_no_stop_string_and_nothing_after_it_is_ever_shown(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    out, hit, shown = scan(stops, pieces)
    assert hit == any(stop in text for stop in stops)
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if hit:
        assert text[len(out) :].startswith(tuple(stops))
    else:
        assert out == text
    for i in range(len(shown)):  # nothing was shown that the next character could have turned into a stop string
        so_far = "".join(shown[: i + 1])
        assert out.startswith(so_far)


def test_without_stop_strings_nothing_is_held() -> None:
    assert scan([""], ["a", "b"])[2] == ["a", "b"]

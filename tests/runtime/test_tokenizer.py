import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4graph.errors import SessionError
from v4graph_runtime import Tokenizer
from v4graph_runtime.tokenizer import IncrementalText

TEXTS = ["In the beginning", "naïve café", "🤯👩‍👩‍👧", "中文字符", " leading", "a\ufffdb", "\n\n"]


def pieces(
    tokenizer: Tokenizer, ids: list[int], context: list[int], special_tokens: bool = False
) -> list[str]:
    text = IncrementalText(tokenizer, context, special_tokens)
    return [*(text.push(token) for token in ids), text.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "x", "né🤯"])
def test_pieces_join_to_the_text_and_no_character_is_split(
    byte_tokenizer: Tokenizer, prompt: str, text: str
) -> None:
    out = pieces(byte_tokenizer, byte_tokenizer.encode(text, start=False), byte_tokenizer.encode(prompt))
    assert "".join(out) == text
    if "\ufffd" not in text:
        assert [piece for piece in out if piece] == list(text)


@given(ids=st.lists(st.integers(0, 257), max_size=40), special_tokens=st.booleans())
def test_pieces_of_any_tokens_join_to_the_decoded_whole(
    byte_tokenizer: Tokenizer, ids: list[int], special_tokens: bool
) -> None:
    out = pieces(byte_tokenizer, ids, byte_tokenizer.encode("né🤯"), special_tokens)
    assert "".join(out) == byte_tokenizer.decode(ids, special_tokens)
    "".join(out).encode("utf-8")


def test_special_tokens_are_text_only_if_asked_for(byte_tokenizer: Tokenizer) -> None:
    ids = [0, *byte_tokenizer.encode("a", start=False), 1]
    assert (byte_tokenizer.decode(ids), byte_tokenizer.decode(ids, special_tokens=True)) == (
        "a",
        "<bos>a<eos>",
    )
    assert pieces(byte_tokenizer, ids, []) == ["", "a", "", ""]
    assert pieces(byte_tokenizer, ids, [], special_tokens=True) == ["<bos>", "a", "<eos>", ""]


def test_an_incomplete_character_is_held_back_until_the_end(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("a🤯", start=False)[:-1]
    assert pieces(byte_tokenizer, ids, []) == ["a", "", "", "", "\ufffd"]


def test_half_a_character_is_refused_with_its_place(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(SessionError, match=r"U\+DCFF at 2 is half of a character"):
        byte_tokenizer.encode("ab\udcff")


def test_the_start_token_comes_once(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.encode("")[:1] == [0]
    assert byte_tokenizer.encode("<bos>a") == byte_tokenizer.encode("a")
    assert byte_tokenizer.encode("a", start=False) == byte_tokenizer.encode("a")[1:]


def test_it_is_loaded_from_the_first_folder_that_has_one(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    byte_tokenizer.core.save(str(full / "tokenizer.json"))
    assert Tokenizer.load(empty, None, full).bos_id is None
    for bos in ("<bos>", {"content": "<bos>"}):
        (full / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "add_bos_token": False}))
        tokenizer = Tokenizer.load(empty, full)
        assert (tokenizer.bos_id, tokenizer.vocab_size) == (0, 258)
    (full / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(SessionError, match=r"bos_token '<s>' is not in tokenizer\.json"):
        Tokenizer.load(full)
    (full / "tokenizer_config.json").write_text("[]")
    with pytest.raises(SessionError, match="not a JSON object"):
        Tokenizer.load(full)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=f"no tokenizer.json in {tmp_path}; copy the model's"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SessionError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)

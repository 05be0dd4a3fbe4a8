"""Constrained outputs match, whatever a model would choose, with every tokenizer."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from v4graph.errors import SessionError
from v4graph_runtime import Constraint, Grammars, Matcher, Tokenizer

NANO = Path(__file__).parents[2] / "models" / "nano"
DEEPSEEK = Path(__file__).parents[3] / "shared" / "golden" / "tokenizer"

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": -3, "maximum": 12},
        "tags": {"type": "array", "items": {"enum": ["é", "ß🤯", "</think>"]}, "maxItems": 2},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
# No \d or \w: the library knows digits and letters of a later Unicode than Python's re.
PATTERNS = (
    *(r"", r"abc", r"[a-z]{2,5} (no|yes|yes, yes)", r"(ab|a)*c?", r"-?[0-9]{1,3}(\.[0-9]+)?", r"^x{3}$"),
    *(r"[^a]{4}", r"naïve|🤯+", r"a\n\\b/\"c", r"(?i)end", r".{0,6}", r"[a-zß]{1,9}@.{1,9}\.(com|org)"),
)


def accepts(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"name", "size"} <= value.keys() <= SCHEMA["properties"].keys()  # type: ignore[attr-defined]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and isinstance(value["size"], int)
        and -3 <= value["size"] <= 12
        and isinstance(value.get("sure", True), bool)
        and len(value.get("tags", [])) <= 2
        and set(value.get("tags", [])) <= {"é", "ß🤯", "</think>"}
    )


def load(name: str) -> Tokenizer:
    if name == "deepseek" and not DEEPSEEK.is_dir():
        pytest.skip("DeepSeek's tokenizer is not beside this checkout")
    return Tokenizer.load(NANO if name == "nano" else DEEPSEEK)


@pytest.fixture(scope="module", params=["bytes", "nano", "deepseek"])
def grammars(request: pytest.FixtureRequest, byte_tokenizer: Tokenizer) -> Grammars:
    return Grammars(byte_tokenizer if request.param == "bytes" else load(request.param), [1])


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return load("nano")


def drive(grammars: Grammars, constraint: Constraint, seed: int) -> str:
    """Return the text of random choices among the allowed tokens; a long one closes what is open."""
    ends = [grammars._tokenizer.core.token_to_id(letter) for letter in '"}]0m.@']
    random = np.random.default_rng(seed)
    matcher, ids = grammars.matcher(constraint), []
    while not matcher.finished:
        allowed = matcher.allowed()
        assert allowed is not None
        if allowed[1] and (len(ids) > 20 or random.random() < 0.1):
            break
        closing = [i for i in ends if i is not None and allowed[i]] if len(ids) > 60 else []
        token = int(random.choice(closing or np.flatnonzero(allowed)))
        if token == 1:
            break
        matcher.accept(token)
        ids.append(token)
        assert len(ids) < 500
    return grammars._tokenizer.decode(ids, special_tokens=True)


@pytest.mark.parametrize("seed", range(10))
def test_random_choices_match_the_schema(grammars: Grammars, seed: int) -> None:
    text = drive(grammars, Constraint("json_schema", json.dumps(SCHEMA)), seed)
    assert accepts(json.loads(text)), text


@pytest.mark.parametrize("seed", range(5))
def test_random_choices_are_an_object(grammars: Grammars, seed: int) -> None:
    text = drive(grammars, Constraint("json_object"), seed)
    assert isinstance(json.loads(text), dict), text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_choices_match_the_pattern(grammars: Grammars, pattern: str) -> None:
    for seed in range(10):
        text = drive(grammars, Constraint("regex", pattern), seed)
        assert re.fullmatch(pattern, text), text


def follow(matcher: Matcher, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text, start=False):
        allowed = matcher.allowed()
        assert allowed is None or allowed[token]
        matcher.accept(token)


def test_stop_ids_are_allowed_exactly_where_the_output_may_end(nano: Tokenizer) -> None:
    matcher = Grammars(nano, [1]).matcher(Constraint("regex", "ab?c?"))
    ends = []
    for text in ("a", "b", "c"):
        ends.append((bool(matcher.allowed()[1]), matcher.finished))  # type: ignore[index]
        follow(matcher, nano, text)
    allowed = matcher.allowed()
    assert ends == [(False, False), (True, False), (True, False)]
    assert matcher.finished
    assert np.flatnonzero(allowed).tolist() == [1]  # type: ignore[arg-type]
    matcher.accept(1)
    assert matcher.finished


def test_other_stop_ids_take_the_place_of_the_usual_ones(nano: Tokenizer) -> None:
    grammars = Grammars(nano, [1])
    newline = nano.encode("\n", start=False)[0]
    matcher = grammars.matcher(Constraint("regex", "a*"), [newline])
    allowed = matcher.allowed()
    assert allowed is not None
    assert (allowed[newline], allowed[1]) == (True, False)
    # A word that ends the output is not a part of it.
    inside = grammars.matcher(Constraint("regex", "a(.|\n)*b"), [newline])
    follow(inside, nano, "a")
    assert not inside.allowed()[newline]  # type: ignore[index]
    nothing = grammars.matcher(Constraint("regex", "a"), [])
    follow(nothing, nano, "a")
    assert nothing.finished
    assert not nothing.allowed().any()  # type: ignore[union-attr]


def test_nothing_is_constrained_before_the_token_after_which_it_begins(byte_tokenizer: Tokenizer) -> None:
    matcher = Grammars(byte_tokenizer, [1]).matcher(Constraint("regex", "x", after="!"))
    start = byte_tokenizer.encode("!", start=False)[0]
    for token in byte_tokenizer.encode("any \n", start=False):
        assert matcher.allowed() is None
        assert not matcher.finished
        matcher.accept(token)
    matcher.accept(start)
    assert np.flatnonzero(matcher.allowed()).tolist() == byte_tokenizer.encode("x", start=False)  # type: ignore[arg-type]


def test_the_mask_is_as_wide_as_the_engine_and_ends_with_the_tokenizer(nano: Tokenizer) -> None:
    allowed = Grammars(nano, [1290], vocab_size=1300).matcher(Constraint("regex", "(.|\n)*")).allowed()
    assert allowed is not None
    assert len(allowed) == 1300
    assert np.flatnonzero(allowed[1280:]).tolist() == [10]
    # Added tokens are no text.
    assert not allowed[:2].any()


def test_control_tokens_that_are_marked_as_words_are_no_text() -> None:
    tokenizer = load("deepseek")
    allowed = Grammars(tokenizer, [1]).matcher(Constraint("regex", ".*")).allowed()
    assert allowed is not None
    for token in ("<｜User｜>", "</think>", "｜DSML｜"):
        assert not allowed[tokenizer.core.token_to_id(token)]
    added = tokenizer.core.get_added_tokens_decoder()
    assert [token for token in added if allowed[token]] == [1]


@pytest.mark.parametrize("schema", ["true", "{}"])
def test_a_schema_may_allow_any_json(byte_tokenizer: Tokenizer, schema: str) -> None:
    for text in ("null", "[1, true]", '{"a": "é"}'):
        matcher = Grammars(byte_tokenizer, [1]).matcher(Constraint("json_schema", schema))
        follow(matcher, byte_tokenizer, text)
        assert matcher.allowed()[1]  # type: ignore[index]


def test_texts_do_not_share_what_they_have_read(nano: Tokenizer) -> None:
    grammars = Grammars(nano, [1])
    first, second = (grammars.matcher(Constraint("regex", "a|bc")) for _ in range(2))
    follow(first, nano, "b")
    follow(second, nano, "a")
    follow(first, nano, "c")
    assert first.finished
    assert second.finished


def test_a_grammar_is_compiled_once(nano: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from v4graph_runtime import constraint

    compiled: list[Constraint] = []
    compile_: Callable[..., Any] = constraint._compile
    monkeypatch.setattr(constraint, "KEPT", 2)
    monkeypatch.setattr(constraint, "_compile", lambda core, one: compiled.append(one) or compile_(core, one))
    grammars = Grammars(nano, [1])
    for pattern in ("a", "b", "a", "c", "a", "b"):
        grammars.matcher(Constraint("regex", pattern))
    assert [one.text for one in compiled] == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    ("constraint", "message", "reason"),
    [
        (Constraint("regex", "a("), r"the regular expression 'a\(' cannot constrain", "unclosed group"),
        (Constraint("regex", "(?=x)y"), "cannot constrain an output", "look-around"),
        (Constraint("regex", "a\\"), r"the regular expression 'a\\\\' cannot be read", "escapes nothing"),
        (Constraint("regex", "\ud800"), "cannot be read", "surrogates not allowed"),
        (
            Constraint("json_schema", "{"),
            r"the JSON schema \{ cannot be read; correct what",
            "Expecting property name",
        ),
        (Constraint("json_schema", "[1]"), "cannot be read", "Expecting object schema"),
        (Constraint("json_schema", '{"minimum": NaN}'), "cannot be read", "NaN is not JSON"),
        (Constraint("json_schema", '{"type": "objct"}'), "cannot constrain an output", "objct"),
        (Constraint("json_schema", '{"not": {}}'), "cannot constrain an output", "not"),
        (Constraint("json_schema", "[" * 100_000), "cannot be read", "recursion"),
        # Not a second grammar beside the schema.
        (Constraint("json_schema", 'true}, {"lark_grammar": "start: /x/"'), "cannot be read", "Extra data"),
        (Constraint("regex", "x", after="two words"), "begins after 'two words', which is not one token", ""),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    nano: Tokenizer, constraint: Constraint, message: str, reason: str
) -> None:
    with pytest.raises(SessionError, match=message) as caught:
        Grammars(nano, [1]).matcher(constraint)
    assert reason in caught.value.detail
    assert "\n" not in caught.value.args[0]
    assert len(caught.value.args[0]) < 160


def test_white_space_ends_and_lets_json_be_indented(byte_tokenizer: Tokenizer) -> None:
    def matches(text: str) -> bool:
        matcher = Grammars(byte_tokenizer, [1]).matcher(Constraint("json_object"))
        try:
            follow(matcher, byte_tokenizer, text)
        except AssertionError:
            return False
        return matcher.finished

    value = {"a": [1, {"b": ["  \n\n", None]}], "c": {}}
    assert all(matches(json.dumps(value, indent=indent)) for indent in (None, 0, 2, 8))
    assert matches(json.dumps(value, separators=(",", ":")))
    assert not matches('{  "a": 1}')
    assert not matches('{\n\n"a": 1}')


def test_a_token_that_does_not_match_is_refused(nano: Tokenizer) -> None:
    matcher = Grammars(nano, [1]).matcher(Constraint("regex", "ab"))
    with pytest.raises(SessionError, match="token 5 does not match the constraint") as caught:
        matcher.accept(5)
    assert "doesn't satisfy the grammar" in caught.value.detail


def test_a_tokenizer_that_cannot_write_the_output_is_refused() -> None:
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models

    core = Core(models.BPE(vocab={"a": 0, "b": 1, "<eos>": 2}, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>"])
    matcher = Grammars(Tokenizer(core), [2]).matcher(Constraint("regex", "ac"))
    matcher.accept(0)
    with pytest.raises(SessionError, match="cannot go on, though it is not complete") as caught:
        matcher.allowed()
    assert "<state>" not in caught.value.detail


def test_without_the_library_the_extra_is_named(nano: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SessionError, match=r"llguidance is not installed.*pip install 'v4graph\[serve\]'"):
        Grammars(nano, [1]).matcher(Constraint("json_object"))

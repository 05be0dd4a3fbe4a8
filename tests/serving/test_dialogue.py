"""Conversations over a real engine loop; the words are those of an untrained model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import NANO, export_and_build

from v4graph.errors import ChatError, SessionError
from v4graph_export import ExportOptions
from v4graph_runtime import PrefixCache, Session, Snapshot, Tokenizer
from v4graph_runtime.serving import Dialogue, Engine, RequestOptions

SHORT = RequestOptions(max_new_tokens=12)
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ExportOptions(numerics="exact", max_seq_len=1024)
    return export_and_build(tmp_path_factory.mktemp("nano"), NANO, options)


@pytest.fixture
def engine(nano: Path) -> Iterator[Engine]:
    with (
        Session(nano, NANO) as session,
        Engine(session, Tokenizer.load(NANO), cache=PrefixCache(interval=64)) as engine,
    ):
        yield engine


def answers(dialogue: Dialogue, *texts: str) -> list[dict[str, Any]]:
    for text in texts:
        dialogue.say(text).message_at_end()
    return dialogue.messages


def test_turns_follow_on_each_other_and_are_not_read_again(engine: Engine) -> None:
    dialogue = Dialogue(engine, SHORT, messages=[SYSTEM])
    first = dialogue.say("Who was Noah?")
    deltas = list(first)
    assert "".join(delta.text for delta in deltas if delta.kind == "content") == first.message.content
    assert [one["role"] for one in dialogue.messages] == ["system", "user", "assistant"]
    second = dialogue.say("And his sons?")
    second.message_at_end()
    assert second.generation.prompt_tokens > first.generation.prompt_tokens
    assert second.generation.cached_tokens >= first.generation.prompt_tokens
    dialogue.forget()
    assert dialogue.messages == [SYSTEM]


def test_a_saved_conversation_goes_on_elsewhere_without_being_read(
    engine: Engine, nano: Path, tmp_path: Path
) -> None:
    dialogue = Dialogue(engine, SHORT, "thinking", [SYSTEM])
    answers(dialogue, "Who was Noah?", "Go on.")
    size = dialogue.save(tmp_path / "noah.state")
    assert size == (tmp_path / "noah.state").stat().st_size > 0
    with Session(nano, NANO) as session, Engine(session, Tokenizer.load(NANO)) as other:
        loaded = Dialogue(other, SHORT)
        loaded.load(tmp_path / "noah.state")
        assert (loaded.messages, loaded.mode) == (dialogue.messages, "thinking")
        position = session.position[0]
        assert position == engine.session.position[0] > 0
    expected = answers(dialogue, "And then?")
    # The cache brings what the state at the end cannot: thoughts are dropped from the next prompt.
    with (
        Session(nano, NANO) as session,
        Engine(session, Tokenizer.load(NANO), cache=PrefixCache(interval=64)) as other,
    ):
        loaded = Dialogue(other, SHORT)
        loaded.load(tmp_path / "noah.state")
        assert answers(loaded, "And then?") == expected


def test_a_loaded_state_is_used(engine: Engine, nano: Path, tmp_path: Path) -> None:
    dialogue = Dialogue(engine, SHORT, messages=[SYSTEM])
    answers(dialogue, "Who was Noah?")
    dialogue.save(tmp_path / "noah.state")
    with (
        Session(nano, NANO) as session,
        Engine(session, Tokenizer.load(NANO), cache=PrefixCache()) as other,
    ):
        loaded = Dialogue(other, SHORT)
        loaded.load(tmp_path / "noah.state")
        reply = loaded.say("And then?")
        reply.message_at_end()
    assert reply.generation.cached_tokens >= engine.session.position[0] - 1


def test_a_cancelled_answer_counts_as_far_as_it_came(engine: Engine) -> None:
    dialogue = Dialogue(engine, RequestOptions(max_new_tokens=800))
    reply = dialogue.say("Who was Noah?")
    next(reply)
    reply.cancel()
    reply.message_at_end()
    assert reply.generation.finish == "cancelled"
    assert 0 < reply.generation.new_tokens < 800
    assert len(dialogue.messages) == 2


def test_an_answer_is_as_long_as_there_is_room(engine: Engine) -> None:
    dialogue = Dialogue(engine, RequestOptions(max_new_tokens=100_000, stop_ids=()))
    text = "And he begat sons and daughters. " * 60
    reply = dialogue.say(text)
    reply.message_at_end()
    assert reply.generation.finish == "length"
    assert reply.generation.prompt_tokens + reply.generation.new_tokens == engine.session.capacity + 1
    with pytest.raises(SessionError, match="the engine holds 1024"):
        dialogue.say(text)
    assert len(dialogue.messages) == 2


def test_files_of_others_are_refused(engine: Engine, tmp_path: Path) -> None:
    dialogue = Dialogue(engine, SHORT)
    engine.submit("abc", SHORT).text()
    engine.session.snapshot(0).save(tmp_path / "plain.state")
    with pytest.raises(SessionError, match="a snapshot without a conversation"):
        dialogue.load(tmp_path / "plain.state")
    with pytest.raises(SessionError, match="cannot be read"):
        dialogue.load(tmp_path / "none.state")
    assert Snapshot.load(tmp_path / "plain.state").notes == {}
    with pytest.raises(ChatError):
        Dialogue(engine, SHORT, messages=[{"role": "nobody", "content": ""}]).say("Hello")

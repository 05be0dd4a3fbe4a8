from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4graph_runtime.stop_text import StopText

# Few letters, so that stop texts overlap, repeat and hold one another.
WORDS = st.text("ab", min_size=1, max_size=5)


def pieces(stop: list[str], parts: list[str]) -> tuple[list[str], bool]:
    text = StopText(stop)
    out = [*(text.push(part) for part in parts), text.flush()]
    return out, text.stopped


@given(st.lists(WORDS, max_size=4), st.text("abc", max_size=30), st.sets(st.integers(1, 29)))
def test_the_text_ends_at_the_earliest_stop_however_it_is_cut(
    stop: list[str], text: str, cuts: set[int]
) -> None:
    places = [text.find(one) for one in stop if one in text]
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    out, stopped = pieces(stop, [text[start:end] for start, end in pairwise(bounds)])
    assert "".join(out) == text[: min(places, default=len(text))]
    assert stopped == bool(places)


@given(st.lists(WORDS, max_size=4), st.text("abc", max_size=20))
def test_no_more_is_held_back_than_could_begin_a_stop(stop: list[str], text: str) -> None:
    filter = StopText(stop)
    out = ""
    for end, letter in enumerate(text, 1):
        out += filter.push(letter)
        if filter.stopped:
            break
        held = text[len(out) : end]
        assert not held or any(one.startswith(held) or held.find(other) > 0 for one in stop for other in stop)


def test_what_may_begin_a_stop_is_held_back() -> None:
    assert pieces(["###"], ["a#", "b##", "c"]) == (["a", "#b", "##c", ""], False)
    assert pieces(["###"], ["a#", "##b"]) == (["a", "", ""], True)
    assert pieces(["###"], ["a##"]) == (["a", "##"], False)


def test_a_stop_inside_of_a_longer_one_waits_for_it() -> None:
    assert pieces(["abcd", "c"], ["ab", "c", "d"]) == (["", "", "", ""], True)
    assert pieces(["abcd", "c"], ["ab", "c", "x"]) == (["", "", "ab", ""], True)
    assert pieces(["abcd", "c"], ["ab", "c"]) == (["", "", "ab"], True)


def test_nothing_comes_after_a_stop() -> None:
    text = StopText(["."])
    assert [text.push("a.b"), text.push("c"), text.flush()] == ["a", "", ""]


@pytest.mark.parametrize("text", ["", "a", "naïve 🤯"])
def test_without_stops_text_goes_through_at_once(text: str) -> None:
    assert pieces([], [text]) == ([text, ""], False)

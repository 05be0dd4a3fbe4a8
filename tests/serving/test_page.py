"""The page at /: one file that loads nothing else, and a chat that streams, stops and shows figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser, needs_browser
from fake_engine import FakeEngine, Script
from served import Served, serving

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&amp;"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def say(page: Page, text: str) -> None:
    page.run(f"document.getElementById('text').value = {text!r}; document.getElementById('send').click();")


def done(count: int) -> str:
    """Return the condition that so many answers are there, and none is on its way."""
    return (
        f"document.querySelectorAll('.assistant').length === {count} && !document.querySelector('.running')"
    )


def test_the_page_is_one_small_document_that_loads_nothing(served: Served) -> None:
    answer = served.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert len(answer.content) < 30_000
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", answer.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|@import|url\(", answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@needs_browser
def test_an_answer_streams_and_nothing_in_it_is_markup(page: Page, served: Served) -> None:
    served.engine.say(Script(f"Because.</think>Hello {EVIL}", pace=0.003), "Again.")
    page.open(served.url)
    page.until("document.getElementById('state').textContent === '123.5 kB'")
    page.run("document.getElementById('mode').value = 'thinking'")
    say(page, f"Hi {EVIL}")
    page.until("document.querySelector('.running .body')?.textContent.startsWith('Hello')")
    page.until(done(1))
    found = page.run("""
        const text = (query) => document.querySelector(query).textContent;
        return { title: document.title, user: text('.user .body'), answer: text('.assistant .body'),
                 thought: text('.thought div'), open: document.querySelector('.thought').open,
                 images: document.querySelectorAll('#log img, #log script').length,
                 note: text('.assistant .note'), speed: text('#speed'), used: text('#used'),
                 cached: text('#cached'), model: text('#model'), slots: text('#slots') };""")
    prompt = served.engine.generations[0].prompt_tokens
    count = served.engine.generations[0].new_tokens
    assert found["user"] == f"Hi {EVIL}"
    assert found["answer"] == f"Hello {EVIL}"
    assert (found["thought"], found["open"]) == ("Because.", False)
    assert (found["title"], found["images"]) == ("v4graph: chat", 0)
    assert found["note"] == f"{count} tokens"
    assert re.fullmatch(r"\d+\.\d tokens/s", found["speed"])
    assert found["used"] == f"{prompt + count} / 4,096"
    assert found["cached"] == f"{prompt // 2} of {prompt}"
    assert (found["model"], found["slots"]) == ("v4graph", "0 of 4")
    say(page, "More")
    page.until(done(2))
    assert served.engine.submitted[1][0].endswith(
        f"</think>Hello {EVIL}<｜end▁of▁sentence｜><｜User｜>More<｜Assistant｜><think>"
    )
    assert page.errors == []


@needs_browser
def test_stop_ends_an_answer_and_keeps_what_there_is(page: Page, served: Served) -> None:
    served.engine.say(Script("Hello.", hangs=True))
    page.open(served.url)
    say(page, "Hi")
    page.until("document.querySelector('.running .body')?.textContent === 'Hello.'")
    assert page.run(
        "return document.getElementById('send').hidden && !document.getElementById('stop').hidden"
    )
    page.run("document.getElementById('stop').click()")
    page.until(done(1))
    assert page.run("return document.querySelector('.note').textContent").endswith("stopped")
    served.check_alive()
    assert served.engine.generations[0].finish == "cancelled"
    page.run("document.getElementById('new').click()")
    assert page.run("return document.querySelectorAll('.turn').length") == 0
    assert page.errors == []


@needs_browser
def test_a_refusal_is_shown_and_a_key_asked_for(page: Page, tmp_path: Path) -> None:
    with serving(FakeEngine(["Hello."]), api_key="secret") as served:
        page.open(served.url)
        page.until("!document.getElementById('key-row').hidden")
        say(page, "Hi")
        page.until(done(1))
        assert "no API key" in page.run("return document.querySelector('.failed .note').textContent")
        assert page.run("return document.getElementById('text').value") == "Hi"
        page.run("""const key = document.getElementById('key');
            key.value = 'secret'; key.dispatchEvent(new Event('change'));""")
        page.until("document.getElementById('model').textContent === 'v4graph'")
        say(page, "Hi")
        page.until(done(2))
        assert len(served.engine.submitted) == 1
    page.until("document.getElementById('model').textContent === 'the server does not answer'")
    # Chromium notes each answer of 401, and the server that is gone.
    assert all("401" in error or "ERR_CONNECTION_REFUSED" in error for error in page.errors)
    page.errors.clear()


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(page: Page, served: Served, dark: bool) -> None:
    page.open(served.url, dark=dark)
    say(page, "Hi")
    page.until(done(1))
    contrasts = page.run("""
        const light = (color) => {
          const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const under = (node) => {
          const color = getComputedStyle(node).backgroundColor;
          return /, 0\\)$/.test(color) ? under(node.parentElement) : color;
        };
        const contrast = (node) => {
          const [a, b] = [getComputedStyle(node).color, under(node)].map(light).sort();
          return (b + 0.05) / (a + 0.05);
        };
        return ['.user .body', '.assistant .body', '.assistant .note', 'dt', '#send', '#bar label', '#new']
          .map((query) => contrast(document.querySelector(query)));""")
    assert min(contrasts) >= 4.5, contrasts

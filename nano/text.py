"""Debian's package bible-kjv-text -> chapters of plain ASCII text.

The package stores the text compressed; the `bible` program of package bible-kjv prints it. Both are unpacked
into a work folder with `apt-get download` and `dpkg-deb -x`, so nothing is installed and no root is needed.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("bible-kjv-text", "bible-kjv")
WHOLE_TEXT = "ge1:1-re22:21"
VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)")
BOOKS = (
    "Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel",
    "2 Samuel", "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther",
    "Job", "Psalm", "Proverbs", "Ecclesiastes", "Song of Solomon", "Isaiah", "Jeremiah", "Lamentations",
    "Ezekiel", "Daniel", "Hosea", "Joel", "Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk",
    "Zephaniah", "Haggai", "Zechariah", "Malachi", "Matthew", "Mark", "Luke", "John", "Acts", "Romans",
    "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians", "Philippians", "Colossians",
    "1 Thessalonians", "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon", "Hebrews",
    "James", "1 Peter", "2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation",
)  # fmt: skip
HELD_OUT_EVERY = 37


class TextError(RuntimeError):
    """The text could not be fetched or does not look like the one expected."""


@dataclass(frozen=True)
class Chapter:
    title: str
    text: str


def fetch_text(work_dir: Path) -> str:
    """Return the verses as the `bible` program prints them, one a line, cached in `work_dir/kjv.txt`.

    Raises:
        TextError: apt-get, dpkg-deb or the program failed (its own words are in the text).
    """
    cached = work_dir / "kjv.txt"
    if cached.exists():
        return cached.read_text("ascii")
    work_dir.mkdir(parents=True, exist_ok=True)
    root = work_dir.resolve() / "debian"
    for package in PACKAGES:
        _run(["apt-get", "download", package], work_dir)
        for archive in work_dir.resolve().glob(f"{package}_*.deb"):
            _run(["dpkg-deb", "-x", str(archive), str(root)], work_dir)
    program = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-f", WHOLE_TEXT]
    text = _run(program, work_dir)
    cached.write_text(text, "ascii")
    return text


def read_chapters(verses: str) -> list[Chapter]:
    """Group printed verses into chapters: a heading line, then one verse a line, without numbers.

    Raises:
        TextError: a line is no verse, or the books are not the 66 expected.
    """
    lines: dict[tuple[str, int], list[str]] = {}
    for line in verses.splitlines():
        match = VERSE.fullmatch(line.strip())
        if match is None:
            raise TextError(f"not a verse: {line!r}; expected lines such as 'Ge1:1 In the beginning ...'.")
        book, chapter, _, words = match.groups()
        lines.setdefault((book, int(chapter)), []).append(" ".join(words.split()))
    short_names = list(dict.fromkeys(book for book, _ in lines))
    if len(short_names) != len(BOOKS):
        raise TextError(f"{len(short_names)} books in the text, expected {len(BOOKS)}.")
    names = dict(zip(short_names, BOOKS, strict=True))
    titled = ((f"{names[book]} {number}", words) for (book, number), words in lines.items())
    return [Chapter(title, "\n".join([title, *words]) + "\n") for title, words in titled]


def split_chapters(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """Return (training, held out): every 37th chapter is never trained on."""
    held_out = chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    titles = {chapter.title for chapter in held_out}
    return [chapter for chapter in chapters if chapter.title not in titles], held_out


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or b""
        raise TextError(
            f"{' '.join(command)} failed: {error} {said.decode(errors='replace').strip()}\n"
            "The text comes from the Debian packages bible-kjv-text and bible-kjv (needs libreadline8). "
            "Run `apt-get update` first; without Debian's archive, make the file elsewhere with "
            f"`bible -f {WHOLE_TEXT} > kjv.txt` and give it with --data kjv.txt."
        ) from error
    return done.stdout.decode("ascii")

"""The page at /: one document without other files, and headers that let it load none."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

PARTS = ("page.css", "page.js")


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """Return the document and its headers.

    The policy names the hashes of the style and the script, so nothing that a model writes can run.
    """
    folder = files("v4graph_runtime.serving")
    text = folder.joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for name in PARTS:
        part = folder.joinpath(name).read_text(encoding="utf-8")
        text = text.replace(f"{{{{{name}}}}}", part)
        hashes[name] = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src 'sha256-{hashes['page.css']}'; "
        f"script-src 'sha256-{hashes['page.js']}'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text.encode(), headers

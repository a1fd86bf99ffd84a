"""The shell of every HTML page: one offline file with a content security policy that prints well.

The content security policy lists the page's own style sheet and script by hash, so that injected content cannot run: no
other script, no event handler, no style attribute.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

HEAD = 4096  # bytes at the start of a page that name its maker
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #fff; --line: #ccc; --dim: #666; --chosen: #00694d;
  --rejected: #a34700; --look: #fff4d6; --chip: #f3f3f3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --page: #161616; --line: #444; --dim: #9a9a9a;
  --chosen: #2fc79a; --rejected: #ff8a3d; --look: #3a2f10; --chip: #242424; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: .95rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--line); text-align: right; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; font-weight: normal; }
.wide { overflow-x: auto; } .wide svg { max-width: 100%; height: auto; }
.look { background: var(--look); padding: .4rem .8rem; margin: .4rem 0; border-left: 4px solid #e69f00; }
.dim { color: var(--dim); font-size: .85rem; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } section, table { break-inside: avoid; } }
"""


def document(title: str, made_by: str, body: str, style: str = "", script: str = "") -> str:
    """Return a complete page. body: HTML with its text escaped already; title: plain text; style: appended to STYLE."""
    sheet = STYLE + style
    allowed = f"'{_hash(script)}'" if script else "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(sheet)}'; script-src {allowed};"
        " base-uri 'none'; form-action 'none'"
    )
    lines = [
        "<!doctype html>",
        f"<!-- {made_by} -->",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(title)}</title><style>{sheet}</style></head><body>",
        body,
        *([f"<script>{script}</script>"] if script else []),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def may_be_written(file: Path, made_by: str) -> bool:
    """Return whether the file does not exist, or is an earlier page (or image) of the same maker. Raises OSError."""
    if not file.exists():
        return True
    with file.open("rb") as opened:
        return made_by.encode() in opened.read(HEAD)


def _hash(text: str) -> str:
    """Return the hash that a Content-Security-Policy uses for an inline style sheet or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

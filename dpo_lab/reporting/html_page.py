"""The shell of every HTML page: one offline file with a content security policy that prints well.

The content security policy lists the page's own style sheet and scripts by hash, so that injected content cannot run: no
other script, no event handler, no style attribute.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_lab.reporting.formatting import strip_control

HEAD = 4096  # bytes at the start of a page or an image, which name its maker
FOLDER = Path(__file__).parent


def render(
    template: str,
    made_by: str,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    inserted: str = "",
    **content: Any,
) -> str:
    """Return the page of a template that extends base.html; all text of `content` is escaped.

    styles, scripts: files of this folder, styles beside base.css; inserted: a style sheet that a script may insert.
    """
    from markupsafe import Markup

    style = Markup("".join(_read(name) for name in ("templates/base.css", *styles)))
    code = [Markup(_read(name)) for name in scripts]
    return environment().get_template(template).render(
        made_by=made_by, style=style, scripts=code, script_hashes=_hashes(code) if code else Markup("'none'"),
        style_hashes=_hashes([style, inserted] if inserted else [style]), **content
    )  # fmt: skip


def environment() -> Any:
    """Return the environment of all templates: text is escaped, control characters in it are shown as codes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def strip(value: Any) -> Any:
        return strip_control(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def breakable(text: str) -> Markup:
        """Return a name as HTML that may wrap after `_` and `/`."""
        return Markup(str(escape(strip(text))).replace("_", "_<wbr>").replace("/", "/<wbr>"))

    found = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=strip,
    )
    found.filters["breakable"] = breakable
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return found


def may_be_written(file: Path, made_by: str) -> bool:
    """Return whether the file does not exist, or is an earlier page (or image) of the same maker. Raises OSError."""
    if not file.exists():
        return True
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    page = head.startswith(f"<!doctype html>\n<!-- {made_by} -->\n".encode())  # as in base.html
    return page or (head.startswith(b"\x89PNG") and f"tEXtSoftware\0{made_by}".encode() in head)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hashes(texts: Sequence[str]) -> Any:
    """Return the hashes by which a Content-Security-Policy allows inline style sheets or scripts."""
    from markupsafe import Markup

    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return Markup(" ".join(f"'sha256-{digest}'" for digest in digests))

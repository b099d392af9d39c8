"""For the site: links from the documentation to files that are not part of it become names of these files."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that lead out of docs/, such as those to scripts and examples."""
    depth = page.file.src_uri.count("/")
    up = rf"(?:\.\./){{{depth + 1},}}"
    outside = re.compile(rf"\[([^\]]+)\]\({up}([\w./-]+)(?:#[\w-]+)?\)")
    return outside.sub(r"\1 (`\2`)", markdown)

"""What others may read of a run: names in the place of paths, and no secret.

Options, records and error texts name folders of the machine that a run was on, and may hold keys.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"

_SECRET_NAME = re.compile(r"(^|[_-])(token|key|password|secret)$", re.IGNORECASE)
_SHORTEST_SECRET = 8
_TOKENS = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,})")
_URL = re.compile(r"\b(?!hf://)([a-z][a-z0-9+]*)://[^\s\"'<>`)\]]+", re.IGNORECASE)
_PATH = re.compile(r"(?<![\w:/\\.~-])(?:~|\.{1,2}|[A-Za-z]:)?(?:[\\/][^\s\"'`,;:=|<>()\\/]+){2,}[\\/]?")
_PARTS = re.compile(r"[^,=+]+")


def public_text(text: str) -> str:
    """Take keys, addresses and paths out of a text that a program wrote, such as an error."""
    return _PATH.sub(lambda found: _last(found[0]), _URL.sub(_public_url, without_secrets(text)))


def without_secrets(text: str) -> str:
    """Take out of a text, which people may have written, this machine's keys and folders alone."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    for folder in _folders():
        text = text.replace(folder, "…")
    return _TOKENS.sub(HIDDEN, text)


def public_value(value: Any) -> Any:
    """Return an option's value, or a record with all it holds, as others may read it."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if each and _SECRET_NAME.search(str(name)) else public_value(each)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [public_value(each) for each in value]
    if not isinstance(value, str):
        return value
    if _is_path(value):
        return _last(value)
    # 'base=MODEL,tuned=MODEL+ADAPTER' holds several
    named = _PARTS.sub(lambda part: _last(part[0]) if _is_path(part[0]) else part[0], value)
    return without_secrets(_URL.sub(_public_url, named))


def _is_path(value: str) -> bool:
    """Tell whether a value leads to something on this machine."""
    value = value.strip().removeprefix("file://")
    try:
        path = Path(value).expanduser()
        leads = len(path.parts) > 2 and path.is_absolute()  # '/no_think' is something to say to a model
        leads |= value.startswith(("~", "./", "../"))
        return "\n" not in value and "://" not in value and (leads or ("/" in value and path.exists()))
    except (OSError, RuntimeError, ValueError):  # too long, a home of nobody, a zero byte: a text
        return False


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or HIDDEN


def _public_url(found: re.Match[str]) -> str:
    """Keep of an address what it leads to: hosts and buckets are their owner's matter, and may hold keys."""
    if found[1].lower() in ("http", "https"):
        return "URL"
    return f"…/{_last(found[0].partition('?')[0])}"


def _secrets() -> list[str]:
    from huggingface_hub import get_token

    named = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    return sorted(
        (s for s in {*named, get_token() or ""} if len(s) >= _SHORTEST_SECRET), key=len, reverse=True
    )


def _folders() -> list[str]:
    """Return folders of this machine that paths begin with, the longest first."""
    known = {str(Path.home()), str(Path.cwd()), tempfile.gettempdir()}
    return sorted((folder for folder in known if len(folder) > 1), key=len, reverse=True)

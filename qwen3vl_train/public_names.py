"""Show names of files and addresses without what may be secret: user, password, query, tokens."""

import re
from typing import Any

_URL = re.compile(r"(?:[A-Za-z][\w+.-]*://|\b(?:https?|s3|gs|gcs|abfss?|az|ftp|sftp|file):/)[^\s\"'<>]*")
"""With one slash too: so paths of `pathlib` write an address."""
_NEXT_IN_CHAIN = re.compile(r"::(?=[A-Za-z][\w+.-]*://)")
_PUNCTUATION = ".,:;)]}"
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[a-z]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|A[KS]IA[0-9A-Z]{16}"
    r"|sk-(?:proj-)?[A-Za-z0-9]{20,}|xox[a-z]-[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
)
"""Of Hugging Face, GitHub, GitLab, AWS, OpenAI, Slack, and JSON web tokens."""


def public_name(name: str) -> str:
    """Return the name of a file, a folder or an address as messages, logs, pages and trackers show it.

    s3://user:password@host/a.jsonl?sig=x -> s3://***@host/a.jsonl?***
    """
    if "://" in name or _URL.match(name):
        name = "::".join(map(_hide, _NEXT_IN_CHAIN.split(name)))
    return _TOKEN.sub("***", name)


def public_text(text: str) -> str:
    """Return a message with every address in it as `public_name` shows it."""
    if ":/" in text:
        text = _URL.sub(_hide_within, text)
    return _TOKEN.sub("***", text)


def public_values(value: Any) -> Any:
    """Return nested dicts and lists with every string as `public_name` shows it."""
    if isinstance(value, dict):
        return {key: public_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [public_values(inner) for inner in value]
    return public_name(value) if isinstance(value, str) else value


def last_part(path: str) -> str:
    """Return the last part of a path or address, without the query: it names data sets and rows."""
    shown = public_name(path)
    return re.sub(r"[?#]\*\*\*$", "", shown).rstrip("/").rpartition("/")[2]


def _hide_within(found: re.Match[str]) -> str:
    url = found[0].rstrip(_PUNCTUATION)
    return "::".join(map(_hide, _NEXT_IN_CHAIN.split(url))) + found[0][len(url) :]


def _hide(url: str) -> str:
    scheme, slashes, rest = re.match(r"([^:]*:)?(/{0,2})(.*)", url, re.DOTALL).groups("")  # type: ignore[union-attr]
    if not scheme or not slashes:
        return url
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition("]")[2].partition(":")[2]
    # A colon that no port follows: a password in which a slash or a question mark is not escaped.
    if "@" in authority or (port and not port.isdigit()):
        _, at, after = (authority if "@" in authority else rest).rpartition("@")
        rest = f"***@{after}{rest[len(authority) :] if '@' in authority else ''}" if at else "***"
    kept, mark, hidden = re.match(r"([^?#]*)([?#]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{scheme}{slashes}{kept}{mark}{'***' if hidden else ''}"

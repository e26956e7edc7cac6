"""Values of any kind, and texts of anybody, as a store takes them."""

from typing import Any

import msgspec


def json_text(value: Any) -> str:
    """A value as JSON. What JSON does not have, such as an array or any object, is told as well as can be."""
    try:
        return _JSON.encode(value).decode()
    except Exception:  # whatever a user's object does when it is looked at
        if isinstance(value, dict):
            parts = (f"{json_text(_name(key))}:{json_text(item)}" for key, item in value.items())
            return "{" + ",".join(parts) + "}"
        if isinstance(value, list | tuple):
            return "[" + ",".join(map(json_text, value)) + "]"
        if isinstance(value, msgspec.Struct):
            return json_text(msgspec.structs.asdict(value))
        return _JSON.encode(_name(value)).decode()


def safe_text(text: str) -> str:
    """The text; lone surrogates, which no file takes, are replaced."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _name(value: object) -> str:
    try:
        return safe_text(str(value))
    except Exception:
        return f"<{type(value).__name__}>"


def _plain(value: Any) -> Any:
    """What arrays and numbers of other packages stand for; the text of anything else."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else _name(value)


_JSON = msgspec.json.Encoder(enc_hook=_plain)

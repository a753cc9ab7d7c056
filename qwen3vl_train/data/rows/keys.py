"""The keys of a row, of a turn and of a part: read by name, with an account of those that nothing read."""

import difflib
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from qwen3vl_train.data.errors import RowFault
from qwen3vl_train.data.rows.values import is_empty

_NEARLY = 0.85  # similarity at which an unknown key counts as a known one with a typing error: los, messges


class Keys:
    """One object of a row, and which of its keys were read.

    `take` and `get` read a key. `close` decides about all others by one rule: a key that has a meaning here and holds
    something rejects the row, by its name; so does one that nearly spells such a key. Anything else is metadata, which
    `close` reports as ignored.

    where: position of the object in its row, such as "messages[0]"; "" for the row itself.
    """

    __slots__ = ("_left", "values", "where")

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values, self.where = values, where
        self._left = dict(values)

    def get(self, name: str) -> Any:
        """Return a value as it is, None where it is absent."""
        self._left.pop(name, None)
        return self.values.get(name)

    def take(self, *names: str) -> Any:
        """Return the value of the only key among the names that holds something, None where none does.

        Raise RowFault where several of them do.
        """
        found = value = None
        for name in names:
            if name not in self.values:
                continue
            self._left.pop(name, None)
            if is_empty(self.values[name]):
                continue
            if found is not None:
                fault = f"{self._at()}{found} and {name} are both given; keep one of them"
                raise RowFault(fault, kind="conflicting_fields")
            found, value = name, self.values[name]
        return value

    def mark_read(self, *names: str) -> None:
        """Count keys as read without their values: known metadata, or what another module reads."""
        for name in names:
            self._left.pop(name, None)

    def take_text(self, *names: str) -> Any:
        """Return as `take` does, and "" where one of the names has that and none has more: an empty text is a text."""
        found = self.take(*names)
        return "" if found is None and any(self.values.get(name) == "" for name in names) else found

    def holds(self, name: str) -> bool:
        """Return whether a key holds something, without reading it."""
        return name in self.values and not is_empty(self.values[name])

    def unread(self) -> list[str]:
        """Return the keys that hold something and were not read."""
        return [key for key, value in self._left.items() if not is_empty(value)]

    def all_read(self) -> bool:
        """Return whether every key was read."""
        return not self._left

    def close(self, known: Collection[str], reader: str, remedy: str = "take it out") -> list[str]:
        """Return the unread keys, which are metadata. Raise RowFault where one is not.

        known: keys that have a meaning in this kind of object.
        reader: what did not read them, for the message: "a part of type image".
        """
        unread = self.unread()
        for key in unread:
            if key in known:
                fault = f"{self._at()}{key} holds a value that {reader} does not read; {remedy}"
                raise RowFault(fault, kind="unknown_field")
            if (meant := nearest(str(key), frozenset(known))) is not None:
                fault = f"{self._at()}unknown key {key}; did you mean {meant}?"
                raise RowFault(fault, kind="unknown_field")
        return unread

    def _at(self) -> str:
        return f"{self.where}: " if self.where else ""


@lru_cache(maxsize=4096)
def nearest(key: str, known: frozenset[str]) -> str | None:
    """Return the known key that another one nearly spells, None where there is none. "los" -> "loss" """
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=_NEARLY)
    return close[0] if close else None

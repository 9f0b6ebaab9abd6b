"""What the controls of an explorer say as one line of text, and the way back to what they said before.

Leaves out: the controls, and what follows from them (`_explorer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote

from ._html import short

STEPS = 200  # that Undo remembers
Self = TypeVar("Self", bound="Remembered")


class Remembered:
    """The part of an explorer that knows its settings: as a text, and those before."""

    _turned: list[str]  # names of the controls
    _past: list[dict[str, Any]] = []  # settings, the latest last
    _present: dict[str, Any] = {}
    _turning = False  # whether the last change goes on with the one before
    _last: tuple[Any, float] = (None, 0.0)  # the control that was turned last, and when

    def setting(self, name: str) -> Any:
        """The value of a control."""
        return getattr(self, name).value

    def turn(self, name: str, value: Any) -> None:
        """Give a control a value."""
        getattr(self, name).value = value

    def together(self) -> AbstractContextManager[None]:
        """Take several changes as one."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Name of a control -> its value, for all that the result depends on."""
        return {name: self.setting(name) for name in self._turned}

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Turn several controls at once."""
        for _ in range(2):  # how far a slider reaches may depend on the others
            with self.together():
                for name, value in settings.items():
                    if self.setting(name) != value:
                        self.turn(name, value)

    @property
    def state(self) -> str:
        """What the controls say, as one line of text.

        >>> from bigkit.widgets import SplitExplorer
        >>> SplitExplorer(5, 2).state
        'items=5&processes=2&padding=False'
        """
        return "&".join(f"{name}={quote(_as_text(value), safe=' /,.:+*')}" for name, value in self.settings().items())

    @classmethod
    def from_state(cls: type[Self], state: str) -> Self:
        """An explorer whose controls say what `state` says.

        Raises:
            ValueError: the text is not the state of such an explorer.

        >>> from bigkit.widgets import SplitExplorer
        >>> SplitExplorer.from_state("items=5&processes=2")
        SplitExplorer(5 items on 2: shares 3+2, gather 5, 3 turns, 1 idle)
        """
        explorer = cls()
        explorer.restore(explorer.read_state(state))
        return explorer

    def read_state(self, state: str) -> dict[str, Any]:
        """Name of a control -> the value that the text `state` gives it."""
        given, present = dict(parse_qsl(state.strip().lstrip("?#"), keep_blank_values=True)), self.settings()
        try:
            if not given:
                raise ValueError
            return {name: _from_text(text, present[name]) for name, text in given.items()}
        except (KeyError, ValueError) as error:
            known = ", ".join(present)
            raise ValueError(f"{short(state, 60)!r} is not a state of {type(self).__name__}: expected "
                             f"name=value&name=value with names among {known}") from error  # fmt: skip

    def undo(self) -> None:
        """Take back the last change of a control or of the picture."""
        if self._past:
            settings = self._past.pop()
            self._present, self._last = settings, (None, 0.0)
            self.restore(settings)

    def _remember(self) -> None:
        """Keep the settings from before the last change, unless the same control is still being turned."""
        now = self.settings()
        if now != self._present:
            if self._present and not self._turning:
                self._past = [*self._past[1 - STEPS :], self._present]
            self._present = now


def _as_text(value: Any) -> str:
    return ",".join(map(_as_text, value)) if isinstance(value, (list, tuple)) else f"{value}"


def _from_text(text: str, present: Any) -> Any:
    """A value as `_as_text` wrote it, of the type that a control's present value has."""
    if isinstance(present, bool):
        return {"True": True, "False": False}[text]
    if isinstance(present, (int, float)):
        return float(text) if "." in text or "e" in text else int(text)
    if isinstance(present, (list, tuple)):
        kind = present[0] if present else ""
        return type(present)(_from_text(part, kind) for part in text.split(",") if part)
    return text

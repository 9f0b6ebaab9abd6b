"""`accelerate.utils.environment`: environment variables, for a while or read as values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from ..differences import refuse_unknown as __getattr__

_WORDS = {
    **dict.fromkeys(("y", "yes", "t", "true", "on", "1"), True),
    **dict.fromkeys(("n", "no", "f", "false", "off", "0"), False),
}


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """Read "yes", "true", "on", "1" and the like; as 1 and 0, or with `to_bool` as True and False."""
    if value.lower() not in _WORDS:
        raise ValueError(f"invalid truth value {value}")
    return _WORDS[value.lower()] if to_bool else int(_WORDS[value.lower()])


def get_int_from_env(env_keys: Iterable[str], default: int) -> int:
    """The first of some variables that is a number of 0 or more."""
    return next((value for key in env_keys if (value := int(os.environ.get(key, -1))) >= 0), default)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """A variable that is "1", "true" and the like."""
    return str_to_bool(os.environ.get(key, str(default))) == 1


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """A variable, or the default as text."""
    return os.environ.get(key, str(default))


@contextmanager
def clear_environment() -> Iterator[None]:
    """No environment variable is set within the block; changes in it are lost."""
    with mock.patch.dict(os.environ, clear=True):
        yield


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """Variables, named in any case, that are set within the block.

    >>> with patch_environment(my_flag=1):
    ...     os.environ["MY_FLAG"]
    '1'
    """
    before = {name.upper(): os.environ.get(name.upper()) for name in kwargs}
    os.environ.update({name.upper(): str(value) for name, value in kwargs.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

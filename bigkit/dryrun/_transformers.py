"""What is private in Transformers and dry runs need, in one place. Seen in Transformers 5.17 and 5.23."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from transformers.utils import import_utils


@contextmanager
def as_with_data() -> Iterator[None]:
    """Within it Transformers takes tensors without data for real ones: it asks a mask's values instead of guessing."""
    with mock.patch.object(import_utils, "is_fake_tensor", lambda tensor: False, create=True):
        yield

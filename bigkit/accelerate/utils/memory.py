"""`accelerate.utils.memory`: giving memory back, and trying again with less."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give the GPU memory that PyTorch holds and does not use back to the system."""
    if garbage_collection:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def release_memory(*objects: Any) -> list[Any]:
    """As many None as objects, to be assigned to their names: `a, b = release_memory(a, b)`. Then memory is free.

    >>> release_memory([1], [2])
    [None, None]
    """
    count = len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return [None] * count


def should_reduce_batch_size(exception: Exception) -> bool:
    """Whether an exception says that memory ran out."""
    signs = ("out of memory", "CUBLAS_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_NOT_SUPPORTED", "can't allocate memory")
    return isinstance(exception, RuntimeError) and any(sign in str(exception) for sign in signs)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None, starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:  # fmt: skip
    """Decorator: call `function(batch_size, ...)` again with a smaller batch when memory runs out.

    Args:
        function: takes the batch size before all other arguments.
        starting_batch_size: the first that is tried.
        reduce_batch_size_fn: gives the next one; None takes nine tenths.

    Raises:
        RuntimeError: not even a batch of 1 fits.
        TypeError: the caller has given a batch size, too.

    >>> @find_executable_batch_size(starting_batch_size=16)
    ... def run(batch_size):
    ...     if batch_size > 12:
    ...         raise RuntimeError("CUDA out of memory.")
    ...     return batch_size
    >>> run()
    12
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size, starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )  # fmt: skip
    size = starting_batch_size

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal size
        clear_device_cache(garbage_collection=True)
        names = [*inspect.signature(function).parameters]
        if len(args) >= len(names):
            raise TypeError(
                f"`{function.__name__}` takes the batch size ({names[0]}) from find_executable_batch_size: call it "
                f"without, with {', '.join(names[1:]) or 'no argument'}"
            )
        while True:
            if size < 1:
                raise RuntimeError("No executable batch size found, reached zero.")
            try:
                return function(size, *args, **kwargs)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)
            size = int(size * 0.9) if reduce_batch_size_fn is None else reduce_batch_size_fn()

    return run

"""Recording what a function asks GPUs to do, and replaying it.

One graph may span several GPUs and streams, if work of each comes after the recording's first stream and before its
end: so each is made to wait for it, and it for each (fork and join). What is allocated meanwhile must not be given to
others as long as the graph lives, so it comes from pools that belong to the graph.

Leaves out: what may be recorded (`graphs.py`), and slots (`captured.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import torch

from ..checkpoints.collector import collector_paused
from ._torch import end_failed_capture
from .host_calls import HostCalls, recording_calls

if TYPE_CHECKING:
    from .captured import Found, Rings

Result = TypeVar("Result")


class Recording:
    """One CUDA graph.

    Args:
        devices: the GPUs that take part; the first has the stream on which the graph is started.
        rings: the slots that the recorded work fills.

    Attributes:
        error: what the recorded function raised.
        calls: what the host computes in it.
    """

    def __init__(self, devices: Sequence[torch.device], rings: Rings) -> None:
        self.devices, self.rings = [*devices], rings
        self.error: BaseException | None = None
        self.calls = HostCalls()
        self._found: Found = {}
        self._ended = False
        self._graph, self._pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        self._pools = {device: torch.cuda.MemPool() for device in self.devices[1:]}

    @staticmethod
    def refuse(devices: Sequence[torch.device]) -> None:
        """Refuse devices that have no graphs.

        Raises:
            ValueError: one of them is no GPU of CUDA.
        """
        others = [str(device) for device in devices if device.type != "cuda"]
        if others:
            raise ValueError(
                f"a part of the model works on {others[0]}, and only GPUs of CUDA replay graphs: move it there, or "
                "generate outside of bigkit.graph_decode"
            )

    def record(self, function: Callable[[], Result]) -> Result:
        """Call a function and record what it asks for, without doing it.

        Raises:
            RuntimeError: something cannot be recorded.
        """
        for device in self.devices:
            torch.cuda.synchronize(device)
        try:
            gc.collect()  # pinned RAM among garbage waits for the GPU, which spoils a recording
            with collector_paused(), recording_calls(self.calls):
                return self._record(function)
        except BaseException:
            if not self._ended:
                end_failed_capture(self._pool, self.devices[0])
            raise

    def _record(self, function: Callable[[], Result]) -> Result:
        main, *others = [torch.cuda.Stream(device) for device in self.devices]
        with ExitStack() as stack:
            stack.enter_context(self.rings.borrowed())
            for device, pool in self._pools.items():
                stack.enter_context(torch.cuda.use_mem_pool(pool, device))
            for stream in (*others, main):
                stack.enter_context(torch.cuda.stream(stream))
            # Another thread may allocate meanwhile: an error only if this one does what cannot be recorded.
            capture = torch.cuda.graph(self._graph, self._pool, main, capture_error_mode="thread_local")
            stack.enter_context(self._until_it_ends(capture))
            forked = [*others, *self.rings.streams()]
            for stream in forked:
                stream.wait_stream(main)
            try:
                result, self._found = self.rings.recorded(function)
            except BaseException as error:
                self.error = error
                with suppress(RuntimeError):  # a recording whose streams are not joined does not end
                    for stream in forked:
                        main.wait_stream(stream)
                raise
            for stream in forked:
                main.wait_stream(stream)
        return result

    @contextmanager
    def _until_it_ends(self, capture: torch.cuda.graph) -> Iterator[None]:
        """A capture, noting that it could end: then the graph gives its memory back itself, and must do so alone."""
        capture.__enter__()
        try:
            yield
        finally:
            capture.__exit__(None, None, None)
            self._ended = True

    def replay(self) -> None:
        """Do it all, in the order of the current streams of all devices. Wait for the end if the host is called.

        Raises:
            RuntimeError: the host's part failed.
        """
        first = torch.cuda.current_stream(self.devices[0])
        try:
            with self.rings.ready(self._found):
                for device in self.devices[1:]:
                    first.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.device(self.devices[0]):
                    self._graph.replay()
                for device in self.devices[1:]:
                    torch.cuda.current_stream(device).wait_stream(first)
        finally:
            if self.calls:  # after an interrupt, too: what the host reads may be let go afterwards
                done = torch.cuda.Event(blocking=True)
                done.record(first)
                done.synchronize()  # asleep: who waits for a GPU as ever takes a core from what the CPU computes
        self.calls.check()

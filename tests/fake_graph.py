"""What stands for a CUDA graph on the CPU: a tape of operations, played again on the same memory, without the forward.

As a graph does, it records without computing, knows addresses and nothing of Python, and refuses what makes the host
wait for a value.
"""

from functools import partial
from threading import Thread
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bigkit.offload.escapes import Holders
from bigkit.offload.host_calls import HostCalls, call, recording_calls

aten = torch.ops.aten
REFUSED = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.lift_fresh.default}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in REFUSED:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, output))
        return output


class Recording:
    """Takes the place of `bigkit.offload.recording.Recording`."""

    made = 0

    def __init__(self, devices, rings):
        self.rings, self.error, self.tape, self.calls = rings, None, Tape(), HostCalls()

    @staticmethod
    def refuse(devices):
        pass

    def record(self, function):
        type(self).made += 1
        # A tape holds tensors over slots, a graph only their addresses.
        unheld = mock.patch("bigkit.offload.stream.count_holders", lambda memory, tensors: Holders(0, 0))
        called = mock.patch("bigkit.offload.host_calls.launch", self.launch)
        with self.rings.borrowed(), unheld, called, recording_calls(self.calls), self.tape:
            result, self.found = self.rings.recorded(function)
        self.undo = True  # recording has computed it already: the first replay has nothing left to do
        return result

    def launch(self, number, device):
        self.tape.calls.append((partial(_elsewhere, number), (), {}, None))

    def replay(self):
        with self.rings.ready(self.found):
            if self.undo:
                self.undo = False
                return
            for function, args, kwargs, output in self.tape.calls:
                again = function(*args, **kwargs)
                tree_map(lambda old, new: _write(old, new), output, again)
        self.calls.check()


def _elsewhere(number):
    """A call as the driver makes it: on a thread of its own, whose modes are not those of this one."""
    thread = Thread(target=call, args=(number,))
    thread.start()
    thread.join()


def _write(old, new):
    """A result goes where that of the recording lies; views and what is written in place are there already."""
    if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
        old.copy_(new)

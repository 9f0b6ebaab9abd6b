"""Messages from one process to the next, each asked for before it is sent.

gloo moves no byte of a tensor before its receiver asks for it. Who asks when the tensor is due waits for three ways
along the line (there is one; I want it; here it is) instead of one. So as many messages as groups can be under way are
asked for before they are due, and come while this process works. How large they will be is not known by then: both ends
expect a message to be as large as the smaller one of two that came before it. What is longer comes in a second piece;
what is shorter leaves some of the first piece unused.

nccl carries what lies on GPUs, and only the header comes as a piece.

Leaves out: what messages say (`pipeline.py`), and what is waited for meanwhile (`in_flight.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gather import carrier
from .state import together

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
_HEADER = 16  # numbers: the dtype, whether nccl carries the tensor, how many words and dimensions, and those
_BYTES = 8 * _HEADER
_MOST = 2**22  # bytes that are asked for before they are due
_UNDER_WAY = 16  # pieces of messages that are kept until they have left, if no more groups are under way


class Line:
    """One direction between this process and another one.

    Args:
        peer: the other one's rank.
        tag: a number that the two ends share and no other line between them has.
        ahead: how many messages are asked for before they are due; the same on both ends.
    """

    def __init__(self, peer: int, tag: int, ahead: int = 1) -> None:
        self.peer, self.tag, self.tag_of_rest = peer, 2 * tag, 2 * tag + 1
        self.rooms = deque([0] * ahead)  # bytes of a tensor in the first piece of each of the next messages
        self.last = 0  # bytes of the last tensor
        self.kept = _UNDER_WAY
        self.asked: deque[tuple[Any, Tensor]] = deque()
        self.sent: deque[tuple[Any, Tensor]] = deque()

    def expect_groups(self, count: int) -> None:
        """Keep what so many groups send before any of them takes: two who wait until theirs has left wait for ever."""
        self.kept = max(self.kept, 2 * count)  # a message has two pieces

    def post(self, words: Sequence[int], tensor: Tensor) -> None:
        """Send some numbers and a tensor as it is now, without waiting."""
        if tensor.dtype not in _DTYPES or tensor.ndim + len(words) > _HEADER - 4:
            what = f"a tensor of {tensor.dtype} and {tensor.ndim} dimensions cannot be sent to process {self.peer}"
            raise TypeError(f"{what}: expected one of {', '.join(map(str, _DTYPES))}, and few dimensions")
        # A copy: whose tensor it is may change it, in place, before it has left.
        tensor = tensor.detach().to(carrier(tensor.device), copy=True, memory_format=torch.contiguous_format)
        by_nccl, room = tensor.is_cuda, self.rooms.popleft()
        header = [_DTYPES.index(tensor.dtype), int(by_nccl), len(words), tensor.ndim, *words, *tensor.shape]
        first = torch.empty(_BYTES + room, dtype=torch.uint8)
        first[:_BYTES] = torch.tensor(header + [0] * (_HEADER - len(header))).view(torch.uint8)
        content = torch.empty(0, dtype=torch.uint8) if by_nccl else tensor.view(-1).view(torch.uint8)
        here = content[:room]
        first[_BYTES : _BYTES + len(here)] = here
        with together("pipeline"):
            while len(self.sent) > self.kept:
                self.sent.popleft()[0].wait()
            self.sent.append((dist.isend(first, self.peer, tag=self.tag), first))
            if by_nccl:
                self.sent.append((dist.isend(tensor, self.peer), tensor))
            elif len(content) > room:
                self.sent.append((dist.isend(content[room:], self.peer, tag=self.tag_of_rest), tensor))
        self._expect(len(content))

    def take(self, device: torch.device) -> tuple[list[int], Tensor]:
        """The numbers and the tensor of the next message.

        Raises:
            RuntimeError: a message was lost before.
        """
        while self.rooms:
            self._ask()
        if not self.asked:
            raise RuntimeError(f"process {self.peer} was lost in an earlier call: start all processes anew")
        work, first = self.asked.popleft()
        with together("pipeline"):
            work.wait()
        dtype, by_nccl, count, ndim, *rest = first[:_BYTES].view(torch.int64).tolist()
        shape, room = rest[count : count + ndim], len(first) - _BYTES
        tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=device if by_nccl else None)
        content = torch.empty(0, dtype=torch.uint8) if by_nccl else tensor.view(-1).view(torch.uint8)
        content[:room] = first[_BYTES : _BYTES + len(content)]
        with together("pipeline"):
            if by_nccl:
                dist.recv(tensor, self.peer)
            elif len(content) > room:
                dist.recv(content[room:], self.peer, tag=self.tag_of_rest)
        self._expect(len(content))
        self._ask()
        return rest[:count], tensor.to(device)

    def _expect(self, nbytes: int) -> None:
        """After a tensor of so many bytes, say how many a later message may have in its first piece."""
        self.rooms.append(min(nbytes, self.last, _MOST))
        self.last = nbytes

    def _ask(self) -> None:
        first = torch.empty(_BYTES + self.rooms.popleft(), dtype=torch.uint8)
        with together("pipeline"):
            self.asked.append((dist.irecv(first, self.peer, tag=self.tag), first))

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        with together("pipeline"):
            while self.sent:
                self.sent.popleft()[0].wait()

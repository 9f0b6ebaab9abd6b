"""Messages from one process to the next, each asked for before it is sent.

gloo moves no byte of a tensor before its receiver asks for it. Who asks when the tensor is due waits for three ways
along the line (there is one; I want it; here it is) instead of one. So the next message is asked for as soon as one has
been taken, and it comes while this process works. How large it will be is not known by then: both ends expect it to be
as large as the last one. What is longer comes in a second piece; what is shorter leaves some of the first piece unused.

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
_UNDER_WAY = 16  # messages that are kept until they have left


class Line:
    """One direction between this process and another one.

    Args:
        peer: the other one's rank.
        tag: a number that the two ends share and no other line between them has.
    """

    def __init__(self, peer: int, tag: int) -> None:
        self.peer, self.tag = peer, tag
        self.room = 0  # bytes of a tensor in the first piece of the next message
        self.asked: tuple[Any, Tensor] | None = None
        self.sent: deque[tuple[Any, Tensor]] = deque()

    def post(self, words: Sequence[int], tensor: Tensor) -> None:
        """Send some numbers and a tensor, without waiting."""
        if tensor.dtype not in _DTYPES or tensor.ndim + len(words) > _HEADER - 4:
            what = f"a tensor of {tensor.dtype} and {tensor.ndim} dimensions cannot be sent to process {self.peer}"
            raise TypeError(f"{what}: expected one of {', '.join(map(str, _DTYPES))}, and few dimensions")
        tensor = tensor.detach().contiguous().to(carrier(tensor.device))
        by_nccl = tensor.is_cuda
        header = [_DTYPES.index(tensor.dtype), int(by_nccl), len(words), tensor.ndim, *words, *tensor.shape]
        first = torch.empty(_BYTES + self.room, dtype=torch.uint8)
        first[:_BYTES] = torch.tensor(header + [0] * (_HEADER - len(header))).view(torch.uint8)
        pieces = [first]
        if not by_nccl:
            content = tensor.view(-1).view(torch.uint8)
            here = content[: self.room]
            first[_BYTES : _BYTES + len(here)] = here
            pieces += [content[self.room :]] if len(content) > self.room else []
            self.room = min(len(content), _MOST)
        with together("pipeline"):
            while len(self.sent) > _UNDER_WAY:
                self.sent.popleft()[0].wait()
            self.sent += [(dist.isend(piece, self.peer, tag=self.tag), piece) for piece in pieces]
            if by_nccl:
                self.sent.append((dist.isend(tensor, self.peer), tensor))

    def take(self, device: torch.device) -> tuple[list[int], Tensor]:
        """The numbers and the tensor of the next message."""
        with together("pipeline"):
            if self.asked is None:
                self._ask()
            assert self.asked is not None
            work, first = self.asked
            work.wait()
            dtype, by_nccl, count, ndim, *rest = first[:_BYTES].view(torch.int64).tolist()
            shape = rest[count : count + ndim]
            if by_nccl:
                tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=device)
                dist.recv(tensor, self.peer)
            else:
                tensor = torch.empty(shape, dtype=_DTYPES[dtype])
                content = tensor.view(-1).view(torch.uint8)
                content[: self.room] = first[_BYTES : _BYTES + len(content)]
                if len(content) > self.room:
                    dist.recv(content[self.room :], self.peer, tag=self.tag)
                self.room = min(len(content), _MOST)
            self._ask()
        return rest[:count], tensor.to(device)

    def _ask(self) -> None:
        first = torch.empty(_BYTES + self.room, dtype=torch.uint8)
        self.asked = (dist.irecv(first, self.peer, tag=self.tag), first)

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        with together("pipeline"):
            while self.sent:
                self.sent.popleft()[0].wait()

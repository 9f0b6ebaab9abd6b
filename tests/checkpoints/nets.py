"""A small model for these tests: a parameter of its own, a list, buffers of three kinds, tied weights."""

import torch
from torch import nn

from bigkit import init_empty_weights


class Net(nn.Module):
    def __init__(self, width=16, depth=3, tie=True):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.embed = nn.Embedding(20, width)
        self.h = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 20, bias=False)
        self.register_buffer("cache", torch.arange(4.0), persistent=False)
        if tie:
            self.head.weight = self.embed.weight


def empty(**options):
    with init_empty_weights():
        return Net(**options)


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )

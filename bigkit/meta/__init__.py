"""Models without memory: any `nn.Module` built with its parameters on the meta device, and read as layer records.

A 70B model must be looked at before there is room for it. A meta tensor has a shape and a dtype but no data, so why not
build the model with nothing else? Because its buffers (rotary frequencies, masks, position indices) are in no
checkpoint: their values come from the code of `__init__` alone. By hand: make every new tensor on meta, write down how,
and make it again for real once it turns out to be a buffer.

>>> import torch
>>> from torch import nn
>>> from torch.utils._python_dispatch import TorchDispatchMode
>>> class Naive(TorchDispatchMode):
...     def __init__(self):
...         super().__init__()
...         self.recipes = {}  # storage on meta -> the call that made it
...     def __torch_dispatch__(self, func, types, args=(), kwargs=None):
...         kwargs = kwargs or {}
...         if "device" not in {argument.name for argument in func._schema.arguments}:
...             return func(*args, **kwargs)  # no factory: on meta, an initialiser does nothing
...         empty = func(*args, **{**kwargs, "device": "meta"})
...         self.recipes[empty.untyped_storage()] = func, args, kwargs
...         return empty
...     def real(self, tensor):
...         func, args, kwargs = self.recipes[tensor.untyped_storage()]
...         return func(*args, **kwargs)
>>> with Naive() as naive:
...     model = nn.BatchNorm1d(10_000)
>>> for module in model.modules():
...     for name, buffer in module.named_buffers(recurse=False):
...         if buffer.is_meta:
...             setattr(module, name, naive.real(buffer))
>>> model.weight.device, model.running_var[:3]
(device(type='meta'), tensor([1., 1., 1.]))

It gets wrong whatever is more than one call: `torch.arange(n) / 2`, a mask filled afterwards, a branch on `.item()`, a
default dtype that has changed. `init_empty_weights` keeps the whole history instead, and replays what is needed of it.

Read in this order:

- `empty.py`: the tape, which is the idea, and `init_empty_weights` and `init_on_device`.
- `operations.py`: what a call of a torch operation reads, writes and returns, from its schema.
- `origin.py`: whether a tensor comes from weights, and so has no values.
- `skeleton.py`: a module as the plain records of `model/spec.py`, with its ties. Planners need nothing else.
- `held.py`: a model's tensors and the places that refer to each; loading and offloading need it.
- `cache.py`: what a model's KV cache holds, by running the model without memory.
- `_torch.py`: what is private in PyTorch and used here.

Leaves out: where configs and names come from (`zoo`), and filling an empty model (`checkpoints`).
"""

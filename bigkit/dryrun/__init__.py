"""A run on GPUs that do not exist: predicted memory and time, operation by operation.

PyTorch can run a model's own code on tensors that have a shape and a device, but no data. Every operation passes a
dispatcher, and who listens there sees each tensor come and go. By hand, in ten lines, on PyTorch's meta device:

>>> import torch
>>> from torch.utils._python_dispatch import TorchDispatchMode
>>> class Count(TorchDispatchMode):
...     nbytes = 0
...     def __torch_dispatch__(self, func, types, args=(), kwargs=None):
...         result = func(*args, **(kwargs or {}))
...         self.nbytes += 0 if func.is_view else result.nbytes
...         return result
>>> with torch.no_grad(), Count() as count:
...     x = torch.empty(512, 4096, dtype=torch.float16, device="meta")
...     y = torch.nn.functional.silu(x @ torch.empty(4096, 11008, dtype=torch.float16, device="meta"))
>>> count.nbytes == 2 * (512 * 4096 + 4096 * 11008 + 2 * 512 * 11008)
True

From there to what a real GPU would say, `dry_run` adds: devices named cuda:0, cuda:1, ...; when each storage is free
again; the kernels that a GPU of that kind would choose, with what they ask for meanwhile; PyTorch's allocator; the time
of each operation; and weights that travel.

Read in this order:

    workload    the work: random weights, a prompt, then token by token, as `generate` does it
    inputs      what a model is fed with
    fake_gpu    fake devices, and the log of every storage and operation
    values      the values that follow from shapes alone, such as whether a mask is all ones
    attention   which kernel attention takes, and the slow path
    costs       what an operation computes, reads, writes and asks for
    graphs      what `graph_decode` records: memory from a pool of its own, and no Python in a replay
    rehearse    one run: fill, spread as a map says, do the work
    result      what a run gives: timelines, times, how sure they are, whether it fits
    run         `dry_run`
    replay      equal blocks are run twice and then repeated, which makes explorers fast
    splice      the same run on a GPU with other kernels of attention, without running it again
    fake_bnb    quantized models: bitsandbytes' own Python, without its kernels
    components  what the components of a pipeline take beside their weights
    met         what differs by GPU or version, and what of it was compared with real runs
    export      for other viewers
    _torch, _transformers, _bnb    what is private in those libraries, in one place each

Leaves out: what depends on the weights' values, training, and what happens once for a process, such as loading kernels.
"""

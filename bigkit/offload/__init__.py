"""A model that is spread out: its weights rest in RAM or in files, and visit the GPU for the time of a forward.

A block needs its weights only while it works. So a GPU with room for two blocks can run a model of any size: borrow,
work, return. By hand, with PyTorch's own hooks:

>>> import torch
>>> from torch import nn
>>> def offload(block, device):
...     resting = {name: parameter.data for name, parameter in block.named_parameters()}
...     def borrow(module, inputs):
...         for name, parameter in module.named_parameters():
...             parameter.data = resting[name].to(device)
...         return tuple(x.to(device) for x in inputs)
...     def give_back(module, inputs, output):
...         for parameter in module.parameters():
...             parameter.data = torch.empty(0)
...     block.register_forward_pre_hook(borrow)
...     block.register_forward_hook(give_back)
>>> model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), torch.ones(1, 8)
>>> expected = model(x)
>>> for block in model:
...     offload(block, "cpu")  # or "cuda"
>>> torch.equal(model(x), expected), sum(parameter.nbytes for parameter in model.parameters())
(True, 0)

What is wrong with it is what the files are about. Read in this order:

- `weights.py`: a copy for each tensor. Those of a block lie together, pinned, as they will lie on the GPU; or in the
  checkpoint's own files (`source.py`). A quantized tensor is several plain ones (`codec.py`).
- `handle.py`: `weight.shape` is gone between two forwards, and what is written there is lost. A handle answers.
- `transfer.py`: the GPU waits for every copy. A copy stream fills one slot while the GPU works on another; what comes
  from a file goes through `checkpoints/ring.py`, several small pieces at a time (`reads.py`). On the CPU, pages of the
  file are lent instead (`mapped.py`).
- `stream.py`: nothing is fetched ahead. A streamer lends units in turn, and fetches those that come next. `sites.py`
  sees what users change in between, and `inference_only.py` refuses a backward.
- `copies.py`: a tied weight works on two devices. The model keeps one, and lends copies of it. `outside.py`: modules
  that share one are sent away one by one, or one of them stays.
- `forks.py`: a process is forked in the middle of a forward. `locks.py`: a model is spread anew in the middle of one.
- `escapes.py`: a module returns its weight, or another thread reads it. Who has seen a slot keeps what it saw.
- `hooks.py`: an interrupted forward keeps its weights. A hook of bigkit's gives them back whatever is raised, and
  moves inputs of any kind (`inputs.py`).
- `rows.py`, `experts.py`: a router chooses a few experts, and all of a block travel. Their hook sees the choice
  (`choice.py`), and brings these; or the GPU takes them out of RAM itself (`gather.py`), or still has them
  (`on_device.py`), and then may know it better than the host (`table.py`). Of blocks that are too large for a slot, a
  prompt gets its experts in pieces (`pieces.py`).
- `dispatch.py`: the calls that users know from Accelerate. A device map says which weights travel, and which of them
  together (`options.py`, `grouping.py`, `placing.py`), who lends them (`lenders.py`: a streamer for each device, since
  every GPU has a link), and which modules get hooks (`attach.py`). `moving.py`: the
  model is cast or moved. `load_and_dispatch.py` begins at a checkpoint, `one_place.py` is for all weights in RAM or on
  disk, `whole_model.py` for pipelines of several models, `pipeline.py` for those by a plan.
- `on_cpu.py`: beside the RAM sits an idle processor. For a few tokens it computes MLPs where they rest.
- `graphs.py`: Python needs longer to ask for a decode step than the GPU to compute it. A step is recorded once, with
  its copies into slots (`captured.py`) and its calls of the CPU (`host_calls.py`), and replayed (`recording.py`) on a
  cache with fixed addresses (`static_cache.py`).
- `resting_cache.py`: a long context's keys and values do not fit. They rest in RAM, and visit as weights do.
- `observe.py`: what a forward really did, step by step, from what a streamer tells (`events.py`).
- `_torch.py`: what is private in PyTorch and used here.

Leaves out: making the map (`maps`), reading checkpoints (`checkpoints`), quantizing (`quantize`), and training: what
is offloaded can run, but not learn.
"""

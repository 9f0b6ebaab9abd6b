"""Files: how a checkpoint is cut into shards, checked, loaded into a model, left on disk, and saved.

A safetensors file is a table of contents and then bytes: eight bytes with the length of the header, a header in JSON
(name -> dtype, shape, byte range), and the tensors one after another. So a tensor can be found, mapped into memory or
left where it is without reading anything else. By hand:

>>> import json, os, tempfile
>>> import torch
>>> from bigkit import save_model
>>> folder = tempfile.TemporaryDirectory()
>>> save_model(torch.nn.Linear(3, 2), folder.name)
>>> with open(os.path.join(folder.name, "model.safetensors"), "rb") as file:
...     length = int.from_bytes(file.read(8), "little")
...     header = json.loads(file.read(length))
...     first, last = header["bias"]["data_offsets"]
...     _ = file.seek(8 + length + first)
...     bias = torch.frombuffer(bytearray(file.read(last - first)), dtype=torch.float32)
>>> header["bias"]["dtype"], header["bias"]["shape"], bias.shape
('F32', [2], torch.Size([2]))
>>> folder.cleanup()

A file comes from a stranger, so every number in a header is checked before it is used. A model that is loaded gets the
pages of the file, with no copy on the CPU; what a device map puts on "disk" stays in the file. One rule holds for it: a
tensor that is not on meta is the truth, and a range of a file counts only for the meta tensor it was recorded for.

Read in this order:

- `model/header.py`: the table of contents of one file, checked, without torch.
- `format.py`: a checkpoint, of one file or several (`index.py`), and a tensor of it; `pickles.py`: one of `.bin` files.
  `write.py`: how a file is written.
- `migrate.py`: what modules' own hooks make of names and tensors, as in `load_state_dict`.
- `match.py`: which tensor of a checkpoint is which of a model, and the report of what does not match.
- `load.py`: `load_checkpoint_in_model`; and `to_gpu.py`, from files to a GPU at full speed. Without a model:
  `state_dict.py` for all tensors at once, `one_by_one.py` for each in turn.
- `codecs.py`: FP8, MXFP4, GPTQ, AWQ, ...: how few bits stand for a weight; `fits.py`: whether tensors are what a format
  says; `kernels.py`: decoding on a GPU in one pass; `as_stored.py`: modules that keep weights so; `decoded.py`: stacks
  of which some experts are decoded at a time; `merged.py`: FP8 experts that lie one by one.
- `resting.py`: which bytes of which file stand for a tensor that a model has on meta; `in_order.py`: or several ranges,
  for experts that lie alone in files and together in a model.
- `shards.py`: how a model is cut into files, from names and sizes alone.
- `save.py`: `save_model`, which a crash at any moment leaves with the old checkpoint or the new one.
- `_transformers.py`: what is asked of Transformers, which names and cuts some tensors otherwise in files.

Leaves out: running a model whose weights are on disk (`offload`), and quantizing weights (`quantize`).
"""

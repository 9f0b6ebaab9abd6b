"""Fewer bits: a weight is stored as small whole numbers and a few scales, and is multiplied with in that form.

The idea by hand. Eight bits, one scale for each row of the weight, as LLM.int8 has it:

    >>> import torch
    >>> weight = torch.tensor([[0.5, -2.0, 1.0], [0.1, 0.2, -0.4]])
    >>> scales = weight.abs().amax(1, keepdim=True)
    >>> codes = (weight / scales * 127).round().to(torch.int8)
    >>> codes.tolist()
    [[32, -127, 64], [32, 64, -127]]
    >>> bool(((codes * scales / 127 - weight).abs() <= scales / 254 * 1.001).all())  # half a step at most
    True

Four bits: a code is the number of one of 16 values, and each block of 64 weights has a scale. `nf4` spaces the values
so that normally distributed weights use all of them about equally often; here they are spaced evenly:

    >>> values = torch.linspace(-1, 1, 16)
    >>> block = torch.randn(64, generator=torch.Generator().manual_seed(0))
    >>> scale = block.abs().max()
    >>> codes = (block[:, None] / scale - values).abs().argmin(1)  # (64, 16) -> (64,), each from 0 to 15
    >>> bool((values[codes] * scale - block).abs().max() <= scale / 15 * 1.001)
    True

Two such codes lie in a byte. A product with int8 weights quantizes its inputs too, row by row, and multiplies whole
numbers; inputs that are far larger than the others (outliers) go through 16 bits. 4-bit weights become floats first.
The arithmetic is bitsandbytes': bigkit decides what is quantized where, moves it and stores it.

Reading order:

    bnb.py       a quantized weight: its tensors, making it, taking it apart to travel, putting it together
    stored.py    the same in a checkpoint, checked before a kernel reads it
    config.py    the options
    replace.py   which layers are quantized
    load.py      a model from a checkpoint, one tensor at a time; a model that is loaded
    layers.py    where bigkit's layers do otherwise than bitsandbytes'
    study.py     how far rounding moves a layer's weights and outputs

Leaves out: training (adapters on such a model are `peft`'s business), calibrated methods (GPTQ, AWQ), activations that
stay quantized, and what quantized models cost (`model/estimate.py`, `dryrun/`).
"""

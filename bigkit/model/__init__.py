"""What a model is made of, without torch: its layers as records, the facts of its config, and how much memory it takes.

Everything that is decided before a weight exists is decided from shapes. A model is a tree of modules; each has tensors
with a shape and a dtype; a tensor takes elements x bits / 8 bytes. From that follow the size at rest, the size of every
layer, and, with the facts of the config, the KV cache of a token. By hand, for a block of Llama 2 7B:

    >>> width, wide = 4096, 11008
    >>> block = 4 * width * width + 3 * width * wide + 2 * width      # attention, gated feed-forward, two norms
    >>> block, round(32 * 2 * block / 2**30, 2)                       # parameters; GiB of 32 blocks in 16 bits
    (202383360, 12.06)
    >>> 2 * width * 2                                                 # bytes that a token adds to a block's KV cache
    16384

and as this wing counts it:

    >>> from bigkit import zoo
    >>> spec = zoo.describe("llama-2-7b")
    >>> spec.layers()[1].name, spec.layers()[1].bytes(spec.precision("float16")) // 2 == block
    ('model.layers.0', True)
    >>> spec.kv_bytes(context=1) // 32
    16384

Reading order:

    spec.py         the records: `TensorSpec`, `ModuleSpec`, `ModelSpec`, and `Layer`, the piece that a planner moves
    precision.py    how weights are stored: dtypes, and what bitsandbytes' 8 and 4 bits really take
    attention.py    what a KV cache takes: its growth with the context, and the dtypes that it may have
    experts.py      mixtures of experts: how many, how large, how many of them a token takes
    config.py       a config.json, whose numbers have another name in every family
    header.py       the table of contents of a safetensors file, with a check on every claim that it makes
    gguf.py         the same of a GGUF file, llama.cpp's format
    stored.py       what a checkpoint takes that is quantized already, by its config
    estimate.py     three tables: the classic estimate, what running takes, what training takes
    training.py     the training table: what each of several GPUs keeps, activation checkpointing, LoRA
    pipeline.py     several models of which one works at a time, and the peak of each phase

Leaves out: reading records off a real module (`meta/skeleton.py`), names (`zoo/`), and placing layers (`maps/`).
"""

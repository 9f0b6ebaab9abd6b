"""Which layer rests on which device: plans, the strategies that make them, and Accelerate's names for both.

A model is a chain of layers, and a device map cuts it: the first stretch on GPU 0, the next on GPU 1, and what fits on
no GPU rests in RAM or on disk and visits the GPUs in turn. A greedy walk fills one GPU after the other:

    >>> def sequential(sizes, budgets):
    ...     device_map, gpu = {}, 0
    ...     for name, size in sizes.items():
    ...         while gpu < len(budgets) and size > budgets[gpu]:
    ...             gpu += 1                                          # never back: activations would go to and fro
    ...         if gpu < len(budgets):
    ...             budgets[gpu] -= size
    ...         device_map[name] = gpu if gpu < len(budgets) else "cpu"
    ...     return device_map
    >>> sequential({"embed": 3, "h.0": 4, "h.1": 4, "head": 3}, [8, 5])
    {'embed': 0, 'h.0': 0, 'h.1': 1, 'head': 'cpu'}

What that leaves out makes the difference: room for the layers in flight if anything is offloaded (and none if not),
the KV cache that a layer fills where it runs, activations, tied tensors, the context of CUDA, gaps that a smaller layer
would fill; an even load, or the longest context; and that what is offloaded should be little, and spread evenly.

    >>> from bigkit import plan
    >>> plan("gpt2", {0: "300MiB", 1: "300MiB"}).device_map["transformer.h.11"]
    1

A `Plan` is plain data. `plan.device_map` is an ordinary dict, `explain()` says why each boundary stands where it does,
`to_code()` and `to_json()` keep it; pictures draw it, `dry_run` executes it, `dispatch_model` applies it.

Reading order:

    plan.py          the plan as data
    partition.py     cutting a chain of sizes: fill, balance, spread
    strategies.py    `place`: the strategies, and what to do if not everything fits
    task.py          what the strategies count with: units, rooms, and the bytes on each device
    links.py         the rule by which what rests elsewhere works on several GPUs
    on_cpu.py        how many MLPs the CPU should compute where they rest
    experts.py       experts of a mixture apart from their blocks
    llama_cpp.py     a plan as options of llama.cpp
    hosts.py         `plan_hosts`: a stage for each of several hosts, each with a plan of its own
    tensors.py       what it would give to split every layer instead
    engines.py       such a plan as commands of vLLM, SGLang and llama.cpp
    pipeline.py      which components of a pipeline stay where, come for their phase or block by block, or are split
    own_map.py       a map of the user's own, to be checked and measured
    reasons.py       why a boundary stands there, and what would help
    device_map.py    `infer_auto_device_map` and the other names that Hugging Face Accelerate made known
    predict.py       what a token waits for under a plan
    advise.py        which of many plans is fastest, smallest or best on a machine

Leaves out: moving anything (`offload/`), and what a run takes to the byte and the second (`dryrun/`).
"""

"""A run that does happen: how fast this machine is, what a real GPU's allocator is asked for, how long real calls take.

Everything else in bigkit predicts; this wing says how well. The idea by hand: hooks read a clock before and after each
forward. A GPU is waited for first, since a call returns when its kernels have been queued, not when they are done.

    >>> import time
    >>> import torch
    >>> def clock(*_):
    ...     if torch.cuda.is_available():
    ...         torch.cuda.synchronize()
    ...     times.append(time.perf_counter())
    >>> times = []
    >>> model = torch.nn.Linear(1024, 1024)
    >>> hooks = [model.register_forward_pre_hook(clock), model.register_forward_hook(clock)]
    >>> for _ in range(5):
    ...     _ = model(torch.ones(8, 1024))
    >>> seconds = sorted(end - start for start, end in zip(times[::2], times[1::2]))
    >>> operations = 2 * 8 * 1024 * 1024
    >>> 1e6 < operations / seconds[2] < 1e16  # operations a second: the median of five
    True

Reading order:

    record.py        times the calls of any model beside their prediction; does the work of a dry run for real
    allocations.py   what a GPU's allocator is asked for, as events that `machine/allocator.py` replays
    memory.py        what a process holds in RAM while it works, of its own and of files
    routing.py       which experts a model chooses, token by token
    calibrate.py     rates of this machine: link, disk, memory, products, the pace of Python; kept in the ledger
    twin.py          how long Python takes for a step of one architecture, told by a narrow twin of it
    links.py         what all links bring at once, and what the CPU reads meanwhile

Leaves out: profiles of single kernels (`torch.profiler`), and predictions (`dryrun/`, `machine/`).
"""

"""What a machine can do, on paper, without torch: its devices, what they do in a second, and when what happens.

Three questions about a run need no GPU to answer. How long does an operation take? As long as the slower of two limits:
what it computes over the rate of such products, what it reads over the memory's bandwidth. A token times one matrix of
4096 x 4096 in 16 bits waits for the memory of an H200, a prompt of 512 tokens for its arithmetic:

>>> for tokens in (1, 512):
...     computing, reading = 2 * tokens * 4096**2 / 800e12, 2 * 4096**2 / 4e12
...     print(tokens, "reading" if reading > computing else "computing")
1 reading
512 computing

When is a block there that must be copied first? Two slots of GPU memory, ten blocks of 1 GB, a link of 50 GB/s, 5 ms of
work for each: a slot is refilled when the work that read it is done, and a block works when its bytes have arrived.

>>> link = work = 0.0
>>> free = [0.0, 0.0]
>>> for block in range(10):
...     link = max(link, free[block % 2]) + 1 / 50
...     work = free[block % 2] = max(work, link) + 0.005
>>> round(work, 3)
0.205
>>> from bigkit.machine.streams import Turn, schedule
>>> round(schedule([Turn(f"h.{i}", 10**9, 0.005, "cpu") for i in range(10)], link=50e9).seconds, 3)
0.205

And how much memory does PyTorch reserve for what a program asks for? More: its allocator rounds, caches and splits.

Read in this order:

    hardware    GPUs and machines as their makers describe them
    ram         how much RAM this process may use, and what is left of it
    ledger      what was measured on a machine (`Calibration`), and the file that keeps it
    roofline    one operation -> seconds; the operations of a run -> seconds for each step
    ranges      how far a predicted figure may be off, and what it rests on
    streams     the clock of weights that travel: disk, link, slots, work
    ways        a token over one link, over several, and with MLPs that the CPU computes
    network     the line between two hosts, and when each stage of a model works that spans them
    allocator   PyTorch's caching allocator, request by request
    routing     which experts were chosen, token by token, and what a cache of some of them would have had
    mixture     what a token waits for when some experts are in a cache on the GPU and the others travel

Leaves out: measuring (`bigkit.measure`), running a model's code on such a machine (`bigkit.dryrun`), and pictures.
"""

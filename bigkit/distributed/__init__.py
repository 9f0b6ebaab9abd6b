"""Many processes: each computes its share of the inputs, and all of them get all of the results.

A model that fits on one device can answer N times as many prompts with N devices: start one process for each, give
each the whole model and a part of the prompts, and put the answers together. Nothing but the answers is exchanged.
By hand, in a script that torchrun starts:

    dist.init_process_group("gloo")                        # reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    rank, world = dist.get_rank(), dist.get_world_size()

    each, remainder = divmod(len(prompts), world)          # 5 prompts on 2 processes: 3 + 2
    start = rank * each + min(rank, remainder)
    answers = [model(prompt) for prompt in prompts[start : start + each + (rank < remainder)]]

    parts = [None] * world
    dist.all_gather_object(parts, answers)
    answers = [answer for part in parts for answer in part]

The files do this for every type of input, and say in one sentence what is wrong when something is:

    shares      which positions each process gets: the arithmetic
    split       those positions taken out of a list, a tensor, a dict of columns, a dataset
    state       who am I, on which device, waiting for the others, and what happens when one of them fails
    gather      the results of all, exactly one for each input, in order
    launch      `bigkit launch`: a script in several processes, by torchrun
    notebook    `notebook_launcher`: a function that was written in a notebook in several processes
    map_file    a long file of prompts, resumed where a kill cut it off
    pipeline    one model over the processes, when none of them can hold it
    line        its messages
    taint       what must not reach a block, since it comes from another process's part
    in_flight   many groups of prompts under way in it
    _torch, _transformers   the private parts of these libraries that are needed

Leaves out: training, and which part of a model each process loads (`hosts.py`). Imports no other wing.
"""

"""Diagrams of the course, continued: a model that is loaded, run, stored in fewer bits, and shared by processes.

Drawn with the vocabulary of `diagrams`.
"""

from __future__ import annotations

from .colours import BLUE, GREEN, GREY, ORANGE, PALE, SKY, VERMILLION, WHITE, YELLOW
from .diagrams import Diagram, diagram


@diagram("Calling a module: before, forward, after")  # notebook 06
def hook(d: Diagram) -> None:
    """model(x) calls pre_forward, which may replace the inputs, then forward, then post_forward, which may replace the
    output.
    """
    call = d.block(12, 44, 76, 40, "module(x)", WHITE)
    before = d.block(128, 44, 96, 40, "pre_forward\nthe hook", ORANGE)
    forward = d.block(264, 44, 96, 40, "forward\nthe layer", BLUE)
    after = d.block(400, 44, 96, 40, "post_forward\nthe hook", ORANGE)
    d.arrow(call.right, before.left, text="x")
    d.arrow(before.right, forward.left, text="x′")
    d.arrow(forward.right, after.left, text="y")
    d.arrow(after.bottom, (after.bottom[0], 112), (call.bottom[0], 112), call.bottom, text="y′, the result of the call")


@diagram("One layer's weights at a time")  # notebook 06
def layer_in_turn(d: Diagram) -> None:
    """Eight layers lie in RAM; while layer 3 works, its weights are copied to the device, and those of layer 2 have
    been removed.
    """
    d.note(12, 56, "in RAM", 9.5)
    kept = d.row(90, 44, [f"layer {i}" for i in range(8)], 50, 24, GREY, gap=4)
    d.note(12, 126, "on the device", 9.5)
    here = [
        d.block(b.x, 114, 50, 24, "works" if i == 3 else "", ORANGE if i == 3 else WHITE, dash="" if i == 3 else "3 3")
        for i, b in enumerate(kept)
    ]
    d.arrow(kept[3].bottom, here[3].top, text="copied before its forward")
    d.arrow((kept[1].x, 158), (kept[7].x + 50, 158), text="time: layer 3 works now, layer 4 is next")


@diagram("Three layers share one slot")  # notebook 06
def one_slot(d: Diagram) -> None:
    """In the forward, the slot holds the weights of layers 0, 1 and 2 in turn; in the backward it still holds those of
    layer 2, and all three layers use them.
    """
    for x, title, texts in ((92, "forward", ["W0", "W1", "W2"]), (332, "backward", ["W2", "W2", "W2"])):
        d.note(x + 96, 44, title, 9.5, anchor="middle")
        order = [0, 1, 2] if title == "forward" else [2, 1, 0]
        layers = d.row(x, 56, [f"layer {i}" for i in order], 60, 24, SKY, gap=6)
        right = [text == f"W{i}" for text, i in zip(texts, order)]
        slots = d.row(x, 112, texts, 60, 24, [BLUE if good else ORANGE for good in right], gap=6)
        for slot, layer, good in zip(slots, layers, right):
            d.arrow(slot.top, layer.bottom, text="" if good else "wrong")
    d.note(12, 68, "works", 9.5)
    d.note(12, 124, "slot holds", 9.5)


@diagram("One weight in NF4 is six tensors in the file")  # notebook 10
def six_tensors(d: Diagram) -> None:
    """The codes choose from the table of 16 values; their scales are codes themselves, which choose from a table of 256
    values and have scales of their own; a JSON text holds shape, dtype, block sizes and the mean of the scales.
    """
    codes = d.block(12, 50, 176, 38, "weight\n4-bit codes, two in a byte", BLUE)
    book = d.block(12, 100, 176, 38, "weight.quant_map\nthe 16 values", SKY)
    scales = d.block(12, 162, 176, 38, "weight.absmax\n8-bit codes of the scales", ORANGE)
    table = d.block(12, 212, 176, 38, "weight.nested_quant_map\n256 values for scales", YELLOW)
    groups = d.block(12, 262, 176, 38, "weight.nested_absmax\na scale for each 256 scales", YELLOW)
    facts = d.block(12, 324, 176, 38, "weight.quant_state…\nJSON: shape, dtype, mean", WHITE)
    value = d.block(250, 75, 110, 38, "value\none for each weight", WHITE)
    scale = d.block(250, 212, 110, 38, "scale\none for each 64", WHITE)
    weight = d.block(424, 140, 108, 44, "value × scale\nthe weight, back", GREEN)
    for part, whole in ((codes, value), (book, value), (scales, scale), (table, scale), (groups, scale)):
        d.arrow(part.right, (220, part.right[1]), (220, whole.left[1]), whole.left)
    d.arrow(facts.right, (305, facts.right[1]), scale.bottom)
    d.note(311, 290, "mean")
    d.arrow(value.right, (392, value.right[1]), (392, 155), (424, 155))
    d.arrow(scale.right, (392, scale.right[1]), (392, 170), (424, 170))
    d.arrow(facts.right, (478, facts.right[1]), weight.bottom)
    d.note(484, 262, "shape\nand dtype")


@diagram("A layer with an adapter")  # notebook 11
def adapter(d: Diagram) -> None:
    """The input goes through the frozen 4-bit weight and, beside it, through A and B; the two results are added.
    Gradients pass through both, and only A and B are changed.
    """
    x = d.block(12, 82, 50, 34, "x", WHITE)
    weight = d.block(150, 46, 200, 42, "W, in 4 bits\nfrozen: 256 × 1024 codes", GREY)
    a = d.block(150, 112, 84, 42, "A\n256 → 8", ORANGE)
    b = d.block(266, 112, 84, 42, "B\n8 → 1024", ORANGE)
    y = d.block(470, 82, 56, 34, "y", WHITE)
    plus = d.block(404, 88, 26, 22, "+", WHITE)
    d.arrow(x.right, (100, 99), (100, 67), weight.left)
    d.arrow(x.right, (100, 99), (100, 133), a.left)
    d.arrow(a.right, b.left)
    d.arrow(weight.right, (417, 67), plus.top)
    d.arrow(b.right, (417, 133), plus.bottom)
    d.arrow(plus.right, y.left)
    d.brace(150, 350, 158, "trained: 10,240 numbers beside 262,144 codes")


@diagram("A launcher, and two processes that know each other")  # notebook 13
def processes(d: Diagram) -> None:
    """The launcher starts two processes, gives each its rank, the number of processes and an address with a port, and
    watches both; the processes meet at that port, which process 0 opens.
    """
    launcher = d.block(190, 42, 160, 36, "launcher\nstarts, watches, ends", ORANGE)
    first = d.block(40, 134, 190, 50, "process 0\nRANK=0  WORLD_SIZE=2\nopens the port", BLUE)
    second = d.block(310, 134, 190, 50, "process 1\nRANK=1  WORLD_SIZE=2\njoins there", SKY)
    d.arrow(launcher.left, (135, 60), first.top)
    d.arrow(launcher.right, (405, 60), second.top)
    d.note(270, 96, "tells each one who it is", anchor="middle")
    port = d.block(180, 220, 180, 26, "127.0.0.1 : 29500", WHITE)
    d.arrow((135, 184), (135, 233), port.left)
    d.arrow((405, 184), (405, 233), port.right)
    d.note(270, 259, "MASTER_ADDR : MASTER_PORT, where they exchange results", anchor="middle")


@diagram("Two hosts, four processes")  # notebook 13
def two_hosts(d: Diagram) -> None:
    """Each host runs the same command with its own machine_rank; ranks count over all hosts, local ranks on each, and
    all processes meet at one port of the first host.
    """
    for host, x in enumerate((12, 282)):
        d.block(x, 40, 246, 112, "", "none")
        d.note(x + 8, 52, f"host {host}: --machine_rank {host}", bold=True)
        d.row(x + 12, 68, [f"rank {2 * host + i}\nlocal rank {i}" for i in range(2)], 106, 36, [BLUE, SKY], gap=10)
    d.block(24, 118, 222, 24, "10.0.0.1 : 29500", WHITE)
    d.arrow((294, 130), (246, 130))
    d.note(300, 130, "all four processes meet here")
    d.note(12, 168, "both: --num_processes 4 --num_machines 2 --main_process_ip 10.0.0.1 --main_process_port 29500")


@diagram("A job that can be killed")  # notebook 13
def parts_of_a_job(d: Diagram) -> None:
    """A free process takes the next batch of prompts and writes its answers to a part of its own; when all are done,
    the parts are merged in order and renamed to the answers' file.
    """
    prompts = d.block(12, 70, 96, 40, "prompts.txt\n60 prompts", WHITE)
    first = d.block(160, 44, 84, 36, "process 0\nbatch of 2", BLUE)
    second = d.block(160, 100, 84, 36, "process 1\nbatch of 2", SKY)
    parts = [d.block(286, y, 98, 36, f"part {i}\non disk at once", YELLOW) for i, y in enumerate((44, 100))]
    answers = d.block(434, 70, 96, 40, "answers.jsonl\nall, in order", GREEN)
    for process, part in zip((first, second), parts):
        d.arrow(prompts.right, (134, 90), (134, process.left[1]), process.left)
        d.arrow(process.right, part.left)
        d.arrow(part.right, (408, part.right[1]), (408, 90), answers.left)
    d.brace(286, 384, 142, "what a new start reads first")
    d.note(482, 124, "one rename,\nat the end", anchor="middle")


@diagram("Five prompts, two processes")  # notebook 12
def shared_prompts(d: Diagram) -> None:
    """Process 0 takes prompts 0 to 2, process 1 prompts 3 and 4; each has a whole model; the answers are gathered in
    the order of the prompts.
    """
    colours = [BLUE, BLUE, BLUE, SKY, SKY]
    prompts = d.row(120, 40, [f"prompt {i}" for i in range(5)], 56, 24, colours, gap=4, size=8.5)
    first = d.block(120, 104, 176, 38, "process 0, rank 0\na whole model", BLUE)
    second = d.block(300, 104, 116, 38, "process 1, rank 1\na whole model", SKY)
    answers = d.row(120, 184, [f"answer {i}" for i in range(5)], 56, 24, colours, gap=4, size=8.5)
    for process, item, answer in ((first, prompts[1], answers[1]), (second, prompts[3], answers[3])):
        middle = process.x + process.width / 2
        d.arrow((middle, item.y + 24), process.top)
        d.arrow(process.bottom, (middle, answer.y))
    d.note(12, 84, "split: each takes", 9)
    d.note(12, 96, "its share", 9)
    d.note(12, 158, "gather: everyone", 9)
    d.note(12, 170, "gets all answers", 9)


@diagram("Two kinds of memory")  # notebook 05
def two_memories(d: Diagram) -> None:
    """Anonymous pages hold what a process wrote and exist nowhere else; file-backed pages are a view of the page cache,
    which several processes share and which can be read from the disk again.
    """
    for i, y in enumerate((52, 122)):
        d.block(12, y, 190, 56, "", "none")
        d.note(20, y + 12, f"process {i}", 9.5)
        d.block(20, y + 24, 84, 24, "anonymous", BLUE)
        view = d.block(112, y + 24, 82, 24, "file-backed", YELLOW)
        d.arrow(view.right, (250, view.right[1]), (250, 112), (290, 112), dash="4 3")
    cache = d.block(290, 84, 96, 56, "page cache\nof the system,\nin RAM", YELLOW)
    disk = d.block(454, 84, 76, 56, "the file\non disk", GREY)
    d.arrow(disk.left, cache.right, text="read")
    d.note(12, 196, "RAM is full: anonymous pages stay, and the system ends a process to get them.", 9)
    d.note(12, 210, "File-backed pages are dropped, and read again when they are needed.", 9)


@diagram("Who holds the weights?")  # notebook 05
def who_holds_a_copy(d: Diagram) -> None:
    """The usual way builds a model with random numbers and reads the whole checkpoint beside it: two copies. An empty
    model takes over what was read: one copy. Mapped, the tensors are views of the file: none.
    """
    rows = {
        "usual": [("built model", BLUE), ("checkpoint, read", ORANGE)],
        "sharded": [("built model", BLUE), ("shard", ORANGE)],
        "assigned": [("empty", WHITE), ("checkpoint, read", ORANGE)],
        "mapped": [("empty", WHITE), ("views of the file", YELLOW)],
    }
    copies = {"usual": "2 copies", "sharded": "1 copy and a shard", "assigned": "1 copy", "mapped": "none"}
    for i, (name, parts) in enumerate(rows.items()):
        y, x = 42 + 36 * i, 90.0
        d.note(12, y + 12, name, 9.5, bold=True)
        for text, colour in parts:
            width = 54 if text in ("empty", "shard") else 140
            d.block(x, y, width, 24, text, colour, "/" if colour == YELLOW else "", "3 3" if colour == WHITE else "")
            x += width + 6
        d.note(396, y + 12, copies[name], 9.5)


@diagram("What is stored for a weight")  # notebook 09
def formats(d: Diagram) -> None:
    """Eight formats and the bits that a weight takes in each:"""
    rows = [  # name, bits of a code, what a code is, weights that share a scale, the scale, bits for each weight
        ("int8 (LLM.int8)", 8, "whole number", "a row", "float32", "8.0"),
        ("FP8 (DeepSeek-V3)", 8, "float, 4 + 3 bits", "128 × 128", "float32", "8.0"),
        ("NF4, FP4 (bitsandbytes)", 4, "one of 16 values", "64", "float32", "4.5"),
        ("NF4, scales in 8 bits", 4, "one of 16 values", "64", "8 bits", "4.13"),
        ("GPTQ, AWQ", 4, "whole number", "128", "float16 + zero", "4.16"),
        ("GGUF Q4_K", 4, "whole number", "32", "6 bits + minimum", "4.5"),
        ("MXFP4 (gpt-oss)", 4, "float, 2 + 1 bits", "32", "power of two", "4.25"),
        ("NVFP4", 4, "float, 2 + 1 bits", "16", "FP8", "4.5"),
    ]
    d.label += " " + ", ".join(f"{name} {total}" for name, *_, total in rows) + "."
    for x, text in ((8, "format"), (150, "code"), (320, "group"), (388, "scale"), (532, "bits a weight")):
        d.note(x, 38, text, 9, anchor="end" if x == 532 else "start", bold=True)
    for i, (name, bits, code, group, scale, total) in enumerate(rows):
        y = 50 + 25 * i
        d.note(8, y + 9, name, 9)
        for bit in range(bits):
            d.block(150 + 8 * bit, y + 4, 8, 10, "", BLUE if bits == 8 else SKY)
        d.note(220, y + 9, code, 9)
        d.note(320, y + 9, group, 9)
        d.note(388, y + 9, scale, 9)
        d.note(532, y + 9, total, 9, anchor="end", bold=True)


@diagram("A rehearsal")  # notebook 15
def rehearsal(d: Diagram) -> None:
    """The model's own code runs on fake tensors; every request for memory goes to a model of PyTorch's allocator, every
    operation to a clock.
    """
    code = d.block(12, 74, 110, 44, "the model's code\nas it is", BLUE)
    fake = d.block(172, 74, 124, 44, "fake tensors\nshapes, no numbers", "none", dash="4 3")
    memory = d.block(362, 42, 168, 40, "allocator\nrequests become segments", YELLOW)
    clock = d.block(362, 110, 168, 40, "clock\noperations become seconds", GREEN)
    d.arrow(code.right, fake.left)
    d.arrow(fake.right, (330, 96), (330, 62), memory.left)
    d.arrow(fake.right, (330, 96), (330, 130), clock.left)


@diagram("Three requests, three segments")  # notebook 15
def allocator(d: Diagram) -> None:
    """100 bytes take 512 bytes of a segment of 2 MiB, 3 MiB a part of a segment of 20 MiB, and 19 MiB a whole segment
    of 20 MiB.
    """
    for i, (request, wide, size, name) in enumerate(
        (("100 bytes", 2, 24, "2 MiB"), ("3 MiB", 36, 240, "20 MiB"), ("19 MiB", 240, 240, "20 MiB"))
    ):
        y = 40 + 34 * i
        d.note(12, y + 12, request, 9.5)
        d.arrow((74, y + 12), (104, y + 12))
        d.block(110, y, size, 24, "", WHITE)
        d.block(110, y, wide, 24, "", BLUE)
        d.note(364, y + 12, f"a segment of {name}")
    d.brace(110, 350, 136, "blue: allocated; with white: reserved")


@diagram("A block of a mixture")  # notebook 17
def chosen_experts(d: Diagram) -> None:
    """A token passes the attention; the router gives each of 16 experts a score and chooses two; only these two are
    copied to the GPU, compute, and are added with their weights.
    """
    token = d.block(12, 52, 60, 34, "token", WHITE)
    attention = d.block(104, 52, 76, 34, "attention", BLUE)
    router = d.block(212, 52, 76, 34, "router\n16 scores", BLUE)
    total = d.block(456, 52, 76, 34, "sum\n2 weights", BLUE)
    d.arrow(token.right, attention.left)
    d.arrow(attention.right, router.left)
    d.note(372, 62, "experts 5 and 2", anchor="middle")
    d.note(372, 76, "compute", anchor="middle")
    d.arrow(router.right, (320, 69))
    d.arrow((424, 69), total.left)
    d.note(12, 130, "in RAM or", 9)
    d.note(12, 142, "on disk:", 9)
    for i in range(16):
        expert = d.block(104 + 27 * i, 124, 25, 24, str(i), ORANGE if i in (2, 5) else GREY, size=9)
        if i in (2, 5):
            d.arrow(expert.top, (expert.top[0], 108), (334, 108), (334, 86))
    d.note(350, 100, "copied, because they were chosen", 9)


@diagram("Four calls")  # notebook 08
def four_calls(d: Diagram) -> None:
    """An empty model and a folder of shards go into load_checkpoint_and_dispatch, which places layers on GPUs, in RAM
    and on disk; generate then writes text.
    """
    empty = d.block(12, 46, 132, 40, "init_empty_weights\nshapes, no numbers", "none", dash="4 3")
    files = d.block(12, 112, 132, 40, "snapshot_download\na folder of shards", YELLOW)
    call = d.block(186, 76, 160, 46, "load_checkpoint_\nand_dispatch", ORANGE)
    text = d.block(448, 79, 84, 40, "generate\ntext", GREEN)
    d.arrow(empty.right, (164, 66), (164, 92), (186, 92))
    d.arrow(files.right, (164, 132), (164, 106), (186, 106))
    places = [d.block(372, 50 + 34 * i, 50, 28, name, colour) for i, (name, colour) in enumerate(
        (("GPUs", BLUE), ("RAM", GREY), ("disk", PALE)))]  # fmt: skip
    for place in places:
        d.arrow(call.right, (358, 99), (358, place.left[1]), place.left)
    d.arrow((422, 99), text.left)


@diagram("Kept in one place, at work in another")  # notebook 07
def borrowed(d: Diagram) -> None:
    """Blocks are kept in RAM or on disk; each is copied over the link into one of two slots of the GPU and works there,
    and then the slot is filled again.
    """
    disk = d.block(12, 60, 92, 78, "disk\nblocks 7 to 9", PALE)
    ram = d.block(156, 60, 92, 78, "RAM\nblocks 2 to 6", GREY)
    d.block(356, 40, 172, 118, "", "none")
    d.note(442, 52, "GPU 0", 9.5, anchor="middle", bold=True)
    d.block(366, 64, 152, 24, "blocks 0 and 1, head", BLUE)
    first = d.block(366, 94, 152, 24, "slot 0: block 3 works", ORANGE)
    second = d.block(366, 124, 152, 24, "slot 1: block 4 arrives", YELLOW)
    d.arrow(disk.right, ram.left)
    d.note(130, 84, "6 GB/s", 8.5, anchor="middle")
    d.arrow((248, 106), (330, 106), first.left)
    d.arrow((248, 124), (330, 124), (330, 136), second.left)
    d.note(292, 80, "the link,", 8.5, anchor="middle")
    d.note(292, 92, "25 GB/s", 8.5, anchor="middle")


@diagram("Two slots take turns")  # notebook 07
def two_slots(d: Diagram) -> None:
    """While block 0 works in slot 0, block 1 is copied into slot 1; then block 1 works and block 2 is copied into slot
    0; after the last block comes block 0 of the next token.
    """
    for row, text in enumerate(("slot 0", "slot 1")):
        d.note(12, 56 + 34 * row, text, 9.5)
    for i, block in enumerate((0, 1, 2, 3, None, 9, 0, 1)):
        x = 66 + 58 * i
        if block is None:
            d.note(x + 27, 73, "…", 14, anchor="middle")
            continue
        works = block % 2
        d.block(x, 44 + 34 * works, 54, 24, f"{block} works", ORANGE, size=8.5)
        d.block(x, 44 + 34 * (1 - works), 54, 24, f"{(block + 1) % 10} arrives", YELLOW, size=8.5)
    d.brace(66, 410, 110, "one token")
    d.brace(414, 526, 110, "the next one")


@diagram("One process fails")  # notebook 13
def one_fails(d: Diagram) -> None:
    """Process 1 raises an error; the launcher notices, ends process 0, which waits for it, and shows the error."""
    for y, name in ((40, "process 0"), (74, "process 1"), (108, "launcher")):
        d.note(12, y + 12, name, 9.5)
    d.row(86, 40, ["works", "waits for process 1", "ended"], [90, 170, 60], 24, [BLUE, WHITE, GREY])
    d.row(86, 74, ["works", "1 / 0"], [90, 60], 24, [SKY, VERMILLION])
    _, ends, _ = d.row(86, 108, ["watches", "ends all", "shows the error of 1"], [180, 80, 150], 24, ORANGE)
    d.arrow((236, 86), (256, 86), (256, ends.y - 2))
    d.arrow((300, ends.y), (300, 84), (376, 84), (376, 66))


@diagram("150 MiB are free, in five holes")  # notebook 15
def holes(d: Diagram) -> None:
    """Ten blocks of 30 MiB, every other one freed; a request for 31 MiB fits into none of the holes and gets a segment
    of its own.
    """
    d.row(12, 40, ["", "30 MiB"] * 5, 42, 26, [WHITE, BLUE] * 5, size=8.5)
    d.block(12, 92, 43, 26, "31 MiB", ORANGE, size=8.5)
    d.note(62, 105, "fits into no hole", 9)
    own = d.block(452, 40, 45, 26, "32 MiB", ORANGE, size=8.5)
    d.arrow((150, 105), (own.bottom[0], 105), own.bottom)

"""Diagrams of the course, continued: its map, what a model's bytes are made of, and what a token waits for.

Drawn with the vocabulary of `diagrams`.
"""

from __future__ import annotations

from .colours import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, VERMILLION, WHITE, YELLOW
from .diagrams import Diagram, diagram

QUESTIONS = {  # question -> notebook -> what it is called on the map
    "Does it fit?": {0: "the first answer", 14: "every byte"},
    "Where does it go?": {1: "no weights yet", 2: "a map of layers", 3: "images too"},
    "How does it get there?": {4: "files", 5: "loading", 8: "a whole run"},
    "How does it move?": {6: "hooks", 7: "just in time", 17: "chosen experts"},
    "Fewer bits?": {9: "bits and error", 10: "saving", 11: "fine-tuning"},
    "More processes?": {12: "shared prompts", 13: "launching", 18: "two hosts"},
    "Before you rent?": {15: "rehearsing", 16: "ranked answers"},
    "Faster?": {19: "than the link"},
}
SHORT = (0, 2, 7, 16)  # the notebooks of the path of twenty minutes


@diagram("Twenty notebooks, eight questions")  # index
def course_map(d: Diagram) -> None:
    """The course by question."""
    lines = [f"{asked} {', '.join(f'{n:02} {name}' for n, name in own.items())}" for asked, own in QUESTIONS.items()]
    d.label += " " + ". ".join(lines).replace("?.", "?") + "."
    d.box("key", 8, 30, 12, 10, ORANGE)
    d.note(25, 35, "the path of twenty minutes")
    for i, (question, own) in enumerate(QUESTIONS.items()):
        y = 52 + 34 * i
        d.note(8, y + 13, question, 10, bold=True)
        blocks = [
            d.block(150 + 130 * k, y, 118, 26, f"{number:02} {name}", ORANGE if number in SHORT else SKY)
            for k, (number, name) in enumerate(own.items())
        ]
        for a, b in zip(blocks, blocks[1:]):
            d.arrow(a.right, b.left, width=1)


@diagram("As stored: small codes, and a scale for many of them")  # notebook 14
def codes_and_scales(d: Diagram) -> None:
    """FP8 stores one byte a weight and a float32 scale for each square of 128 x 128; MXFP4 stores half a byte a weight
    and one byte, a power of two, for each 32 in a row.
    """
    d.note(8, 44, "FP8 (DeepSeek-V3): weight = code x scale of its square", 9.5, bold=True)
    for i in range(3):
        for k in range(4):
            d.block(8 + 44 * k, 58 + 26 * i, 44, 26, "128\n x 128" if not (i or k) else "", SKY, size=8)
    d.note(96, 148, "codes: 1 byte each", anchor="middle")
    for i in range(3):
        for k in range(4):
            d.block(236 + 22 * k, 71 + 18 * i, 22, 18, "", ORANGE)
    d.note(280, 140, "scales: 4 bytes for 16,384 codes", anchor="middle")
    d.arrow((226, 71), (236, 76))
    d.line("pointer", [(184, 66), (226, 71)], GREY, 1.2)
    d.note(420, 90, "8 + 32 / 16,384\n= 8.002 bits a weight", 9)
    d.note(8, 178, "MXFP4 (gpt-oss): weight = value of the code x 2^(scale − 127)", 9.5, bold=True)
    d.row(8, 192, [""] * 16, 20, 22, SKY)
    d.brace(8, 328, 218, "16 bytes hold 32 codes of 4 bits")
    d.block(350, 192, 30, 22, "", ORANGE)
    d.note(365, 233, "1 byte", anchor="middle")
    d.note(420, 197, "4 + 8 / 32\n= 4.25 bits a weight", 9)


@diagram("What attention keeps of each token, in each block")  # notebook 14
def kinds_of_attention(d: Diagram) -> None:
    """With a key and a value for every head a token of Llama 2 7B leaves 8,192 numbers in a block; with eight shared
    heads 2,048; a window forgets old tokens; a latent of DeepSeek-V3 has 576 numbers for 128 heads.
    """
    d.note(8, 44, "every head its own (llama-2-7b)", 9.5, bold=True)
    d.row(8, 56, [""] * 32, 7, 16, BLUE)
    d.row(8, 76, [""] * 32, 7, 16, ORANGE)
    d.note(120, 104, "32 keys, 32 values: 8,192 numbers", anchor="middle")
    d.note(300, 44, "four heads share (llama-3.1-8b)", 9.5, bold=True)
    d.row(300, 56, [""] * 8, 28, 16, BLUE)
    d.row(300, 76, [""] * 8, 28, 16, ORANGE)
    d.note(412, 104, "8 keys, 8 values: 2,048 numbers", anchor="middle")
    d.note(8, 134, "a window (mistral-7b)", 9.5, bold=True)
    for k in range(16):
        d.block(8 + 14 * k, 146, 14, 16, "", BLUE if k > 9 else WHITE, dash="" if k > 9 else "3 2")
    d.note(120, 174, "only the last 4,096 tokens are kept", anchor="middle")
    d.note(300, 134, "a latent (deepseek-v3)", 9.5, bold=True)
    latent = d.block(300, 146, 40, 16, "576", GREEN)
    d.arrow(latent.right, (376, 154))
    for k in range(16):
        d.block(380 + 9 * k, 146, 9, 16, "", PALE)
    d.note(412, 174, "keys and values of 128 heads made from it", anchor="middle")


@diagram("The widest moment of a block: the feed-forward's product")  # notebook 14
def widest_moment(d: Diagram) -> None:
    """For each token the activation of the gate, the up-projection and their product live at the same time, three
    tensors of the feed-forward's width, beside about four of the model's width.
    """
    x = d.block(8, 64, 52, 26, "x", YELLOW)
    gate = d.block(110, 44, 84, 26, "gate", "none", dash="4 3")
    act = d.block(240, 44, 110, 26, "activation", ORANGE)
    up = d.block(240, 84, 110, 26, "up", ORANGE)
    product = d.block(410, 64, 110, 26, "product", ORANGE)
    d.arrow(x.right, gate.left)
    d.arrow(x.right, up.left)
    d.arrow(gate.right, act.left)
    d.arrow(act.right, product.left)
    d.arrow(up.right, product.left)
    d.brace(240, 520, 116, "3 tensors of the feed-forward's width")
    d.brace(8, 60, 116)
    d.note(8, 131, "x and others: 4 of the width")
    d.note(152, 78, "freed", 8.5, anchor="middle")


@diagram("One parameter in training: sixteen bytes")  # notebook 14
def sixteen_bytes(d: Diagram) -> None:
    """In mixed precision with Adam a parameter takes two bytes as a weight, two as a gradient, and twelve in float32:
    the weight again and two moments.
    """
    names = ("weight", "gradient", "weight", "first moment", "second moment")
    d.row(8, 44, names, [64, 64, 128, 128, 128], 30, (BLUE, GREEN, BLUE, PURPLE, PURPLE))
    d.brace(8, 136, 78, "bfloat16: 2 + 2 bytes")
    d.brace(136, 520, 78, "float32: 4 + 4 + 4 bytes")


@diagram("A token waits for the slowest of four")  # notebook 16
def four_lanes(d: Diagram) -> None:
    """Weights on disk are read to RAM, weights in RAM cross the link to the GPU, the GPU reads what it holds, and
    Python issues every operation; all four work side by side.
    """
    disk = d.block(8, 84, 84, 36, "disk", GREY)
    ram = d.block(160, 84, 84, 36, "RAM", GREY)
    gpu = d.block(352, 60, 180, 60, "", PALE)
    d.block(360, 84, 74, 30, "GPU memory", BLUE, size=9)
    d.block(466, 84, 58, 30, "compute", YELLOW, size=9)
    python = d.block(352, 152, 180, 24, "Python", VERMILLION)
    d.arrow(disk.right, ram.left, text="3.5 GB/s")
    d.arrow(ram.right, (352, 102), text="link: 27 GB/s")
    d.arrow((434, 99), (466, 99))
    d.note(gpu.top[0], 48, "GPU: 1,008 GB/s", 9, anchor="middle")
    d.arrow(python.top, (442, 120), text="130 steps a block")
    d.note(8, 164, "rates of an RTX 4090 in a desktop", 9)

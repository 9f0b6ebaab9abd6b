"""Whether the CPU should compute some of the weights that rest in RAM, and how many: arithmetic on measured rates."""

FEW = 16

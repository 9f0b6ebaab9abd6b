"""A run that does happen: rates of this machine, allocations of a real GPU, times of real calls."""

"""A run on GPUs that do not exist: predicted memory and time, operation by operation."""

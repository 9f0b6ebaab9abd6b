"""Many processes: who takes which inputs, the results put together, and starting processes."""

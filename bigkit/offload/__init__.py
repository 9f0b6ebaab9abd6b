"""A model that is spread out: weights at rest, the copies that bring them in time, and the hooks that ask for them."""

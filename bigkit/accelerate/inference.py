"""`accelerate.inference`: nothing. In bigkit one process spreads a model over GPUs, by its device map."""

from .differences import refuse_unknown as __getattr__

"""Fewer bits: bitsandbytes' 8- and 4-bit layers, loading into them, and what rounding does to a layer."""

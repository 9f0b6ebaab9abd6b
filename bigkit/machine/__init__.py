"""What a machine can do, on paper, without torch: its devices and links, measured rates, allocator, and streams."""

"""Models without memory: any `nn.Module` built with its parameters on the meta device, and read as layer records."""

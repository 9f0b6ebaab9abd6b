"""Files: how a checkpoint is cut into shards, checked, loaded, and saved."""

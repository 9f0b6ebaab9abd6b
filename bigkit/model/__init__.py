"""What a model is made of, without torch: layer records, the facts of a config, and memory estimates."""

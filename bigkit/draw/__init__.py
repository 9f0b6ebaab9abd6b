"""Pictures: pure functions from data to a figure, each with a text that says the same."""

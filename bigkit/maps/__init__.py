"""Which layer rests where: plans, the strategies that make them, and Accelerate's names for both."""

"""Choosing the batch size: what fits, what is fast, what the gradient noise says, what a sweep shows."""

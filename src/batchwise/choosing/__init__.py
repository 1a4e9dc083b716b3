"""Choosing the batch size by memory, speed and gradient noise, or by a sweep."""

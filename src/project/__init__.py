"""Batchwise: the batch you write is the batch you train on."""

__version__ = "0.1.0"

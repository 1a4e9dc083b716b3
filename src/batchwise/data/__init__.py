"""Data modules: they own the batch."""

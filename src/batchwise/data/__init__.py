"""Data modules: they own the batching."""

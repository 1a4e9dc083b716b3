"""Callbacks: small, one idea each."""

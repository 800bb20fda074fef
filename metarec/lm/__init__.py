"""Frozen language models, users' adapters, and fast forward passes over a catalog."""

"""Scorers that use a language model."""

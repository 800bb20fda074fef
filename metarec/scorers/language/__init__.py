"""Scorers that read a language model."""

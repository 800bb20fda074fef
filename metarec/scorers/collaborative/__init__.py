"""Predictors from ratings and item features; none reads a language model."""

"""Ratings, items, tasks and episodes; nothing here knows a model."""

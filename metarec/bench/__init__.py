"""Measures methods on the same users: plans, cells, summaries, tables and pages."""

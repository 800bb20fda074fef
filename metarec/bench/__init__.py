"""Methods on tasks, side by side: cells, summaries, tables and pages."""

"""Scorers on episodes become reports: metrics, intervals, calibration, recommended lists."""

"""Comparisons, significance tests, attention and reports."""

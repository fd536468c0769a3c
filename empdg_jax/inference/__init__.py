"""Trained systems: loading, scoring, responding and exporting."""

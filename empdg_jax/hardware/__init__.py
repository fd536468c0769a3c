"""Benchmarks, ahead-of-time compilation and chips."""

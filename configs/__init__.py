"""Configurations: each file states its differences from the defaults.

They are installed as `empdg_jax.configs`, so that `--config=empdg` needs no
clone.
"""

"""Layers, encoders, decoders, discriminators and systems."""

"""Layers, encoders, decoders and the systems made of them."""

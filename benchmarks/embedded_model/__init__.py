"""Renderer, training and evaluation of the embedded model `configs/models/shapes`."""

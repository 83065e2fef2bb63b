"""Embedded models, one folder each in diffusers layout."""

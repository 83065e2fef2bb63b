"""Benchmarks that ship with the package: `tetrion bench …`."""

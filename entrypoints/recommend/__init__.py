"""`tetrion recommend`: from measured configurations to the one to choose."""

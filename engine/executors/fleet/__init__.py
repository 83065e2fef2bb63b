"""The worker processes of an engine: the memory they share, their start, their deaths and their return."""

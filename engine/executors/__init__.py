"""Where commands go and events come from: real worker processes, or virtual time."""

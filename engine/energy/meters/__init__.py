"""Meters of energy behind one protocol: NVML, RAPL, recordings, the profile."""

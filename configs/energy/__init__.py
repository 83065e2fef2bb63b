"""Published energy measurements, unchanged: see SOURCE.md."""

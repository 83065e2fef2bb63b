"""Measured cost tables, `<gpu>-<model>.json`, made by `tetrion profile`; chosen by `engine/profile_files.py`."""

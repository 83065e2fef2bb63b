"""Measured cost tables, `<gpu>-<model>.json`, made by `tetrion profile`; chosen by
`engine/measure/profile_files.py`."""

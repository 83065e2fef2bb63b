"""Data that ships with Tetrion: model folders and profiles."""

"""Corpora of ids on disk: the format, reading, and encoding images into one."""

"""Watching what layers read while a model runs: one watcher, and what it hands each input to."""

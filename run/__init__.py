"""Remembers: settings, files, checkpoints, metrics. Imports neither `engine` nor `grading`."""

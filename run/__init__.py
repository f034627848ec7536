"""Settings, files, checkpoints and metrics of a run. Imports neither `engine` nor `grading`."""

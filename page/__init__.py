"""Shows a run as one HTML page. Joins what `grading` and `run` know, and never imports torch."""

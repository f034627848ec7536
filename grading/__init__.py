"""Judges text: rows and completions in; verdicts, scores and reports out. Never imports torch."""

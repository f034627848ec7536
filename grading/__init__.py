"""Turns rows and completions into verdicts, scores and reports. Never imports torch."""

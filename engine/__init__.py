"""Computes: token ids and tensors in; loss, gradients and token ids out.

Knows no GSM8K, no `Config` and no run folder: it never imports `grading`, and of `run` only what
has no memory (its errors, paths and small files).
"""

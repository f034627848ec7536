"""Computes: token ids and tensors in; loss, gradients and token ids out.

It knows nothing of GSM8K, `Config` or run folders. It never imports `grading`, and imports only the
stateless helpers of `run` (errors, paths, small files).
"""

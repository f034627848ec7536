"""Computes: token ids and tensors in; loss, gradients and token ids out.

It knows nothing of GSM8K, `Config` or run folders. It never imports `grading`, and imports only the
stateless helpers of `run` (errors, paths, small files).
"""

import logging

# Transformers imports torchao wherever it is installed, and torchao then says which of its kernels
# it can't load, and PyTorch that one of its calls is deprecated. None of that is used here.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

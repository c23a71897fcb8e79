"""Triton's kernels run in its interpreter where there is no GPU. It must be chosen before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

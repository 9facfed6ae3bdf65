"""Triton's interpreter, before anything imports Triton, where there is no GPU to run its kernels on."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

"""AdamW and the learning rate's course over a run."""

import math

import torch

from config import Config
from model import Phi


def learning_rate(step: int, total: int, config: Config) -> float:
    """Linear warm-up to `lr`, then a cosine or linear decay that would reach 0 after the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * (0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress)


def make_optimizer(model: Phi, config: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); decay on the matrices only, not on biases and LayerNorms."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), fused=True)

"""Supervised fine-tuning: the negative log-probability of the reference answer, per token.

    loss = - sum over answers of log pi(y|x)  /  tokens in those answers            (nats per token)

The sums run over the whole optimizer step: a mean of micro-batch means would weigh a token in a short answer more than
one in a long answer, and the result would depend on how the step was cut. Prompt tokens carry no loss unless the text as
a whole is to be learned (`data.supervise_everything`); the answer's `<|im_end|>` always does, or the model never stops.
"""

import torch
from torch import Tensor


def objective(logprobs: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """logprobs [N] in nats and lengths [N] in tokens -> the summed loss, to be divided by the step's tokens, and the metrics
    as {name: [sum, count]}."""
    total = -logprobs.sum()
    tokens = lengths.sum().to(total.dtype)
    answers = torch.full((), float(len(lengths)), device=total.device)
    return total, {"loss": torch.stack((total.detach(), tokens)), "logps": torch.stack((-total.detach(), answers))}

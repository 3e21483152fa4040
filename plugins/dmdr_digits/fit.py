"""The one training loop of all models here."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm


def fit(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    label: str,
    *,
    examples: int,
    steps: int,
    batch: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.0,
    average: float = 0.0,
) -> None:
    """Train with AdamW under a cosine schedule; the model ends frozen, in eval mode.

    Args:
        loss: Rows of the training set, [batch] int64 in [0, examples), to a scalar.
        average: Decay of the moving average of the weights that the model ends with; 0 for none.
    """
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    mean = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    warmup = max(1, min(100, steps // 10))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    order = torch.cat([torch.randperm(examples) for _ in range(-(-steps * batch // examples))])

    model.train()
    with tqdm(range(steps), desc=label, unit="step", mininterval=1.0, smoothing=0.05) as bar:
        for step in bar:
            value = loss(order[step * batch : (step + 1) * batch])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            rate.step()
            decay = min(average, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(mean, trained, 1 - decay)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{value.item():.3f}")

    with torch.no_grad():
        for parameter, value in zip(trained, mean, strict=True):
            parameter.copy_(value)
    model.requires_grad_(False).eval()

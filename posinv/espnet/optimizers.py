"""The optimiser and the schedule that S3PRL trains with, for presets of released code."""

import math
from collections.abc import Callable

from espnet2.schedulers.abs_scheduler import AbsBatchStepScheduler
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import ParamsT


class S3PRLAdamW(AdamW):
    """AdamW of S3PRL (``s3prl/optimizers.py``): weight decay 0 and epsilon 1e-7 by default.

    Epsilon is added to the square root of the second moment *before* its bias is corrected, as in
    the first version of AdamW in transformers. In torch it is added after: in the n-th update that
    is the epsilon of this class divided by ``sqrt(1 - beta2 ** n)``, 32 times as much in the first.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            group.setdefault("eps_before_correction", eps)
            group.setdefault("updates", 0)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform an update."""
        for group in self.param_groups:
            group["updates"] += 1
            correction = math.sqrt(1 - group["betas"][1] ** group["updates"])
            group["eps"] = group["eps_before_correction"] / correction
        return super().step(closure)


class LinearWarmupDecay(LambdaLR, AbsBatchStepScheduler):
    """transformers' ``get_linear_schedule_with_warmup``, which S3PRL's recipes name.

    The learning rate is 0 in the first update, the optimiser's after ``warmup_steps`` updates, and
    would be 0 in update ``total_steps`` + 1.

    Args:
        optimizer: the optimiser.
        warmup_steps: updates, >= 0.
        total_steps: updates of the whole training, > ``warmup_steps``.
        last_epoch: the last update done, -1 for none.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int, total_steps: int, last_epoch: int = -1
    ) -> None:
        def share(done: int) -> float:
            if done < warmup_steps:
                return done / warmup_steps
            return max(0.0, (total_steps - done) / (total_steps - warmup_steps))

        super().__init__(optimizer, share, last_epoch)

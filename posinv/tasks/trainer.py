"""ESPnet's trainer, with a validation whose random draws are the same in every epoch."""

import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.trainer import Trainer


class SeededTrainer(Trainer):
    """ESPnet's trainer for models that draw at random while they train and validate.

    ESPnet seeds every epoch with ``seed + epoch``, so a resumed run draws as an unbroken one
    does. Here validation is seeded with ``seed`` alone: its loss is a function of the model, and
    curves compare.
    """

    @classmethod
    @torch.no_grad()
    def validate_one_epoch(cls, model, iterator, reporter, options, distributed_option) -> None:
        """Run ESPnet's validation from the random state that ``options.seed`` gives."""
        set_all_random_seed(options.seed)
        super().validate_one_epoch(model, iterator, reporter, options, distributed_option)

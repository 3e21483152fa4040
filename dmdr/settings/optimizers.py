"""The optimizers of --optim: all that is known of each is its row in `OPTIMIZERS`."""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmdr.errors import ConfigError
from dmdr.settings.fields import Config

if TYPE_CHECKING:
    import torch

ARGUMENTS = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}  # of a setting
ADAM = tuple(ARGUMENTS)


@dataclass(frozen=True)
class Optimizer:
    """One of them.

    Attributes:
        place: Its module and class, imported only where it is named.
        package: What pip calls what has to be installed for it; "" for what is there anyway.
        unread: Settings that it does not read.
        fixed: Further arguments.
        fused: Whether it takes `fused`, one kernel for all parameters on devices that have it.
        blocks: Of bitsandbytes' optimizers, which run on no meta device: moments of each parameter, and bytes a number.
        group_state: What its parameter groups hold that is no setting, and has to be saved with the moments.
        finds_rate: Whether it finds the learning rate, so that the one of the settings is a factor.
        shares: Whether it can train parameters that processes share (--shard).
        smaller: The same algorithm with smaller states; "" where there is none.
    """

    place: str
    package: str = ""
    unread: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    blocks: tuple[int, int] | None = None
    group_state: tuple[str, ...] = ()
    finds_rate: bool = False
    shares: bool = False
    smaller: str = ""

    def load(self) -> Callable[..., "torch.optim.Optimizer"]:
        """Its class.

        Raises:
            ConfigError: If its package is not installed.
        """
        module, _, name = self.place.partition(":")
        try:
            found: Callable[..., torch.optim.Optimizer] = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--optim needs {self.package}: pip install {self.package}") from error
        return found

    def options(self, config: Config, *, rate: float, decay: float) -> dict[str, Any]:
        """The arguments of its class, beside the parameters.

        Args:
            rate, decay: Learning rate and weight decay of these parameters.
        """
        given = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
        left_out = {ARGUMENTS.get(setting) for setting in self.unread}
        read = {name: value for name, value in given.items() if name not in left_out}
        return {"lr": rate, "weight_decay": decay, **read, **self.fixed}

    def build(self, parameters: Iterable["torch.nn.Parameter"], **options: Any) -> "torch.optim.Optimizer":
        """An optimizer of parameters, with arguments as `options` gives them."""
        kind = self.load()
        with redirect_stdout(sys.stderr):  # prodigyopt prints
            return kind(parameters, **options)


OPTIMIZERS = {
    "adamw_torch": Optimizer("torch.optim:AdamW", fused=True, shares=True, smaller="adamw_bnb_8bit"),
    "adamw_bnb_8bit": Optimizer("bitsandbytes.optim:AdamW8bit", "bitsandbytes", blocks=(2, 1)),
    "paged_adamw_8bit": Optimizer("bitsandbytes.optim:PagedAdamW8bit", "bitsandbytes", blocks=(2, 1)),
    "lion_32bit": Optimizer(
        "bitsandbytes.optim:Lion", "bitsandbytes", unread=("adam_epsilon",), blocks=(1, 4), smaller="lion_8bit"
    ),
    "lion_8bit": Optimizer("bitsandbytes.optim:Lion8bit", "bitsandbytes", unread=("adam_epsilon",), blocks=(1, 1)),
    # As transformers' Trainer calls it: the learning rate is that of the settings. torch's own Adafactor multiplies it
    # by the size of each parameter, which is 0 for half of a new adapter.
    "adafactor": Optimizer(
        "transformers.optimization:Adafactor", unread=ADAM, fixed={"scale_parameter": False, "relative_step": False}
    ),
    # As the examples of diffusers call it.
    "prodigy": Optimizer(
        "prodigyopt:Prodigy",
        "prodigyopt",
        fixed={"use_bias_correction": True, "safeguard_warmup": True},
        group_state=("d", "d_max", "d_numerator", "k"),
        finds_rate=True,
    ),
}

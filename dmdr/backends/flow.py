"""Flow-matching families: rectified flow, shifted times, and the scheduler of the exported student."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dmdr.backends.component import ComponentConfig, read_component
from dmdr.backends.latents import Latents, ShiftedLatents
from dmdr.backends.options import PipelineOptions
from dmdr.backends.pipeline import PipelineBackend
from dmdr.errors import ConfigError
from dmdr.paths import RectifiedFlow
from dmdr.protocols import Sampler, require
from dmdr.sampling import time_grid, unshift_times


@dataclass(frozen=True, kw_only=True)
class FlowOptions(PipelineOptions):
    """Options of a flow-matching pipeline.

    Attributes:
        shift: Timestep shift of the student's time grid; that of the model's scheduler by default.
    """

    shift: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "shift", self.shift is None or self.shift > 0, "above 0")


class FlowBackend(PipelineBackend):
    """A pipeline with a `FlowMatchEulerDiscreteScheduler`.

    Attributes:
        shift: Timestep shift of training, such as of the times that answers are renoised to.
        unguided: Arguments of the pipeline's call that leave guidance out.
    """

    Options: ClassVar[type[FlowOptions]] = FlowOptions
    options: FlowOptions
    latents_class: ClassVar[type[Latents]] = ShiftedLatents
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}

    def __init__(self, folder: str, options: FlowOptions) -> None:
        """As every pipeline's.

        Raises:
            ConfigError: If the folder's scheduler is another and the options name no shift, too, or it says that the
                network is told other times than 1000 t of a straight path from noise.
        """
        super().__init__(folder, options)
        self.path = RectifiedFlow()
        self.scheduler_config = config = read_component(FlowMatchEulerDiscreteScheduler, self.source, "scheduler")
        config.require("num_train_timesteps", 1000)
        config.require("invert_sigmas", False)
        own, known = config["_class_name"], FlowMatchEulerDiscreteScheduler.__name__
        if own != known:
            if "prediction_type" in config:
                config.require("prediction_type", "flow_prediction")
            if options.shift is None:
                raise ConfigError(f"{folder}/scheduler is a {own}, not a {known}: give its timestep shift with --shift")
            self.scheduler_config = ComponentConfig({}, config.where)
        self.shift = float(options.shift or self.own_shift())

    def own_shift(self) -> float:
        """The shift that the pipeline itself applies at this resolution.

        Source: with `use_dynamic_shifting` exp(mu), or mu itself where `time_shift_type` is linear; mu is linear in
            the number of image tokens (diffusers' `calculate_shift`, `_time_shift_exponential`, `_time_shift_linear`).
        """
        config = self.scheduler_config
        if not config["use_dynamic_shifting"]:
            return config.number("shift", positive=True)
        few, many = config.whole("base_image_seq_len"), config.whole("max_image_seq_len")
        low, high = config.number("base_shift"), config.number("max_shift")
        if few == many:
            raise config.refused("max_image_seq_len", "another number than base_image_seq_len")
        config.require("time_shift_type", "exponential", "linear")
        _, height, width = self.latent_shape
        tokens = height * width // self.patch_size**2
        mu = float(low + (high - low) * (tokens - few) / (many - few))
        return mu if config["time_shift_type"] == "linear" else math.exp(mu)

    def own_grid_shift(self, num_inference_steps: int) -> float:
        """The shift that the pipeline itself applies to a grid of so many steps."""
        return self.own_shift()

    def grid_shift(self, num_inference_steps: int) -> float:
        """That of the student's grid."""
        return self.options.shift or self.own_grid_shift(num_inference_steps)

    def grid(self, num_inference_steps: int) -> Tensor:
        return time_grid(num_inference_steps, self.grid_shift(num_inference_steps))

    def teacher_grid(self, num_inference_steps: int) -> Tensor:
        """The straight line with the model's own shift, whatever the student's is."""
        known = bool(self.scheduler_config)  # of another scheduler only --shift is known
        return time_grid(num_inference_steps, self.own_grid_shift(num_inference_steps) if known else self.shift)

    def scheduler(self, sampler: Sampler) -> FlowMatchEulerDiscreteScheduler:
        if 0 < sampler.eta < 1:
            raise ConfigError(f"--sample_eta {sampler.eta:g}: the scheduler of this model supports 0 and 1 only")
        config = self.scheduler_config | {
            "shift": self.grid_shift(sampler.num_inference_steps),
            "use_dynamic_shifting": False,
            "shift_terminal": None,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "stochastic_sampling": sampler.eta == 1,
        }
        return FlowMatchEulerDiscreteScheduler.from_config(config)

    def own_guidance(self) -> float | None:
        """Of a call that counts from what `unguided` says."""
        ((name, none),) = self.unguided.items()
        own = self.own_call_arguments().get(name)
        return 1 + float(own) - none if isinstance(own, int | float) else None

    def call_arguments(self, sampler: Sampler) -> dict[str, Any]:
        """The grid before the shift, which the scheduler applies: shifted sigmas would be shifted twice."""
        shift = self.grid_shift(sampler.num_inference_steps)
        return super().call_arguments(sampler) | {
            "sigmas": unshift_times(sampler.t[:-1], shift).tolist(),
            **self.unguided,
        }

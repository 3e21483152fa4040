"""A Gaussian mixture with an exact teacher: distribution matching against the truth, on a CPU, in seconds.

The data are points of the plane: prompt "mode k" is N(centre_k, std^2 I), the empty prompt the mixture of all four.
The teacher is the exact posterior mean; student and fake score are the teacher plus a trained residual that starts at
zero, as LoRA adapters do. Images show the point as their colour: red is x, green is y.
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dmdr.backends.images import to_unit_range
from dmdr.cache import cache_folder
from dmdr.errors import TrainingError
from dmdr.images import save, to_pil, write_atomically
from dmdr.paths import NoisePath, Prediction, RectifiedFlow, expand
from dmdr.protocols import FeatureRole, Role, Sampler, require
from dmdr.sampling import time_grid
from dmdr.states import load_strict, read_tensors
from dmdr.types import Condition

CENTRES = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]])
STD = 0.3
WIDTH = 64
PROMPTS = tuple(f"mode {k}" for k in range(len(CENTRES)))


def posterior_mean(x_t: Tensor, t: Tensor, path: NoisePath, mean: Tensor, std: float) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, std^2 I), [B, D], for states x_t [B, D] of a noise path at times t [B].

    Source: the conditional mean of jointly Gaussian x0 and x_t = alpha x0 + sigma eps.
    """
    alpha, sigma = expand(path.alpha(t), x_t).to(x_t.dtype), expand(path.sigma(t), x_t).to(x_t.dtype)
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x_t - alpha * mean)


def mixture_mean(x_t: Tensor, t: Tensor, path: NoisePath, centres: Tensor, std: float) -> Tensor:
    """E[x0 | x_t] for the even mixture of N(centre_k, std^2 I), [B, D].

    Args:
        x_t, t: States [B, D] of the noise path and their times [B].
        path: The noise path.
        centres: [M, D].
        std: Standard deviation of each component.

    Source: the means of the components, weighted by their posterior probabilities given x_t.
    """
    alpha, sigma = expand(path.alpha(t), x_t).to(x_t.dtype), expand(path.sigma(t), x_t).to(x_t.dtype)
    distance = ((x_t[:, None] - alpha[:, None] * centres) ** 2).sum(-1)
    share = (-distance / (2 * (alpha**2 * std**2 + sigma**2))).softmax(-1)
    each = torch.stack([posterior_mean(x_t, t, path, centre, std) for centre in centres], 1)
    return (share[..., None] * each).sum(1)


class Residual(nn.Module):
    """What a trained role adds to the teacher's velocity; zero at first."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        last = nn.Linear(width, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Linear(2 + 2 + len(CENTRES), width)
        self.net = nn.Sequential(first, nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Velocity [B, 2] for states x_t [B, 2], times t [B] and labels [B] int64."""
        return self.net[4](self.hidden(x_t, t, label)[-1])

    def hidden(self, x_t: Tensor, t: Tensor, label: Tensor) -> list[Tensor]:
        """What its two hidden layers answer, each [B, width]."""
        t = t.to(x_t.dtype)[:, None]
        given = torch.cat([x_t, t, t**2, nn.functional.one_hot(label, len(CENTRES)).to(x_t.dtype)], 1)
        first = self.net[:2](given)
        return [first, self.net[2:4](first)]


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    """Options of the toy.

    Attributes:
        shift: Timestep shift of the student's time grid; 1, which is none, by default.
        seed: Of the initial values.
    """

    shift: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "shift", self.shift is None or self.shift > 0, "above 0")


class ToyBackend:
    """The mixture as a model family (`protocols.Backend`)."""

    Options = ToyOptions
    feature_widths: Sequence[int] = (WIDTH, WIDTH)

    def __init__(self, folder: str, options: ToyOptions) -> None:
        self.path: NoisePath = RectifiedFlow()
        self.latent_shape: tuple[int, ...] = (2,)
        self.shift = options.shift or 1.0
        self.options = options
        self.residuals: dict[str, Residual] = {}

    def prepare(self, accelerator: Any, *, roles: Sequence[Role]) -> None:
        self.device = accelerator.device
        self.centres = CENTRES.to(self.device)
        self.residuals = {}
        self._create(*roles, *([] if "fake_score" in roles else ["untrained"]))
        untrained = self.residuals["fake_score"] if "fake_score" in roles else self.residuals.pop("untrained")
        self._untrained = deepcopy(untrained).requires_grad_(False)
        if "reference" in roles:
            self.residuals["reference"].requires_grad_(False)
            self.snapshot()

    def _create(self, *roles: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            self.residuals |= {role: Residual().to(self.device) for role in roles}

    def add_role(self, name: str, *, rank: int, alpha: float) -> Mapping[str, nn.Parameter]:
        if name not in self.residuals:
            self._create(name)
        return dict(self.residuals[name].named_parameters())

    def grid(self, num_inference_steps: int) -> Tensor:
        return time_grid(num_inference_steps, self.shift)

    def teacher_grid(self, num_inference_steps: int) -> Tensor:
        return time_grid(num_inference_steps)

    def snapshot(self) -> None:
        self.residuals["reference"].load_state_dict(deepcopy(self.residuals["student"].state_dict()))

    def encode(self, prompts: Sequence[str], **columns: Sequence[Any]) -> Condition:
        labels = [PROMPTS.index(prompt) if prompt in PROMPTS else 0 for prompt in prompts]
        return Condition(tuple(prompts), {"label": torch.tensor(labels, device=self.device)}, columns)

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        colour = torch.cat([latents / 4, torch.zeros_like(latents[:, :1])], 1)
        return to_unit_range(colour)[:, :, None, None].expand(-1, -1, 4, 4)

    def encode_images(self, images: Tensor) -> Tensor:
        return (images.mean((2, 3))[:, :2] * 2 - 1) * 4

    def _exact(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: float) -> Tensor:
        """The guided teacher's velocity."""
        c = posterior_mean(x_t, t, self.path, self.centres.to(x_t.dtype)[cond.tensors["label"]], STD)
        if guidance != 1:
            u = mixture_mean(x_t, t, self.path, self.centres.to(x_t.dtype), STD)
            c = u + guidance * (c - u)
        return (x_t - c) / expand(t, x_t).to(x_t.dtype)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition, role: str, guidance: float = 1.0) -> Prediction:
        if role not in self.residuals:
            raise TrainingError(f"this run has no {role}: who asks for it must declare it in needs.roles")
        velocity = self._exact(x_t, t, cond, guidance) + self.residuals[role](x_t, t, cond.tensors["label"])
        return Prediction(velocity, "velocity", x_t, t, self.path)

    def student(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict(x_t, t, cond, "student")

    def fake_score(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict(x_t, t, cond, "fake_score")

    def reference(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict(x_t, t, cond, "reference")

    @torch.no_grad()
    def teacher(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float = 1.0, fake_mix: float = 0.0
    ) -> Prediction:
        velocity = self._exact(x_t, t, cond, guidance)
        if fake_mix:
            velocity = velocity + fake_mix * self.residuals["fake_score"](x_t, t, cond.tensors["label"])
        return Prediction(velocity, "velocity", x_t, t, self.path)

    def features(
        self, role: FeatureRole, x_t: Tensor, t: Tensor, cond: Condition, layers: Sequence[int]
    ) -> list[Tensor]:
        """Hidden layers of the fake score's residual; of the teacher, those that it had before training."""
        network = self._untrained if role == "teacher" else self.residuals[role]
        hidden = network.hidden(x_t, t, cond.tensors["label"])
        return [hidden[layer][:, None].float() for layer in layers]

    def ask_role(self, x_t: Tensor, t: Tensor, cond: Condition, *, role: str, guidance: float = 1.0) -> Prediction:
        return self._predict(x_t, t, cond, role, guidance)

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        return dict(self.residuals[role].named_parameters()) if role in self.residuals else {}

    def export(self, directory: Path, sampler: Sampler) -> Mapping[str, Any]:
        save_file(self.residuals["student"].state_dict(), directory / "student.safetensors")
        return {"sigmas": sampler.t[:-1].tolist()}

    def snippet(self, base: str, prompt: str, sampler: Sampler) -> str:
        return "# the toy has no stock pipeline: dmdr-sample draws from it"

    def load_export(self, directory: Path) -> None:
        file = directory / "student.safetensors"
        load_strict(self.residuals["student"].state_dict(), read_tensors(file), str(file))


class Toy:
    """`--model toy` (`protocols.NamedModel`)."""

    pipeline: ClassVar[str] = "ToyPipeline"
    recipe: ClassVar[Mapping[str, Any]] = {
        "stage1_steps": 100,
        "stage2_steps": 50,
        "learning_rate": 1e-3,
        "stage2_learning_rate": 1e-3,
        "fake_learning_rate": 2e-3,
        "per_device_train_batch_size": 64,
        "reward": "toy",
        "sample_images": 16,
        "num_eval_samples": 0,
    }

    def folder(self) -> Path:
        folder = cache_folder() / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": self.pipeline}))
        return folder

    def prompts(self) -> list[dict[str, Any]]:
        return [{"prompt": prompt} for prompt in PROMPTS]

    def real_images(self) -> Path:
        """A folder of 64 points of each mode, as pictures."""
        folder, side = self.folder() / "points", 8
        if not (folder / "metadata.jsonl").is_file():
            generator, rows = torch.Generator().manual_seed(0), []
            for mode, centre in enumerate(CENTRES):
                points = centre + STD * torch.randn(side**2, 2, generator=generator)
                colours = torch.cat([points / 8 + 0.5, torch.full_like(points[:, :1], 0.5)], 1)
                for i, picture in enumerate(to_pil(colours[:, :, None, None].expand(-1, -1, 4, 4))):
                    rows.append({"file_name": f"{mode}-{i:02d}.png", "prompt": PROMPTS[mode]})
                    save(picture, folder / rows[-1]["file_name"])
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(folder / "metadata.jsonl", lines.encode())
        return folder

    def reward_checkpoint(self, reward: str, *, held_out: bool = False) -> Path | None:
        return None

    def judge(self) -> None:
        return None


@dataclass
class Redness:
    """`--reward toy`: how red the image is, that is, how far to the right the point lies; in [0, 1].

    A `FeatureReward`: the mean colour along the text's, which is red unless the text begins with "Green".

    Attributes:
        calls: How often it has scored.
    """

    differentiable: ClassVar[bool] = True
    calls: int = field(default=0, init=False, repr=False)
    _device: torch.device = field(default=torch.device("cpu"), init=False, repr=False)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device

    def image_features(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        green = torch.tensor([prompt.startswith("Green") for prompt in prompts], device=self._device)
        return nn.functional.one_hot(green.long(), 3).float()

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B] float32."""
        self.calls += 1
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)

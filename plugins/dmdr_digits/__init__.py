"""`--model digits`: the embedded default, a small StableDiffusion3Pipeline of real handwritten digits.

Nothing is downloaded: the package holds the pipeline, its judge and its reward checkpoints, trained on the 8x8 scans of
scikit-learn; `python -m dmdr_digits` trains them anew. Held-out rewards, and all of another length of training
(`DMDR_DIGITS_BUDGET`), are built on first use and kept in `~/.cache/dmdr` (or `DMDR_CACHE`).
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr.errors import ConfigError

if TYPE_CHECKING:
    from dmdr_digits.judge import DigitJudge

__all__ = ["Digits"]

# Every layer of the transformer: attention alone leaves the student short of the teacher's variety.
LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"),
    *("pos_embed.proj", "context_embedder", "linear_1", "linear_2"),
]

# Where each small checkpoint is built.
REWARDS = {
    **dict.fromkeys(("hps", "clip", "pickscore", "aesthetic", "dinov2"), "dmdr_digits.rewards"),
    "imagereward": "dmdr_digits.imagereward",
}


class Digits:
    """The `NamedModel` of the digits."""

    pipeline = "StableDiffusion3Pipeline"
    recipe: Mapping[str, Any] = {
        "rl": "refl",
        "rl_weight": 0.3,
        "reward": "0.3*hps+0.3*clip",
        "stage1_steps": 140,
        "stage2_steps": 60,
        "num_inference_steps": 4,
        "max_sequence_length": 1,  # there is no T5: one zero token in its place instead of 256
        "guidance_scale": 1.0,
        "dyna_steps": 40,
        "reward_tilt": 4.0,
        "lora_target_modules": LAYERS,
        "lora_rank": 16,
        "lora_alpha": 16.0,
        # The network is 64 wide: this is a fake score of full rank. A higher learning rate makes it noisy and slow.
        "fake_lora_rank": 64,
        "fake_lora_alpha": 256.0,
        "fake_learning_rate": 3e-4,
        "gan_learning_rate": 5e-3,
        "noise_mean": -0.5,  # of LADD: latents of 4 x 4 are gone at noise that one of 128 x 128 is seen through
        "learning_rate": 1.2e-3,
        "stage2_learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "adam_beta1": 0.0,
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
        "per_device_train_batch_size": 64,
        "logging_steps": 5,
        "save_steps": 0,
        "sample_steps": 20,
        "sample_images": 40,
        "num_eval_samples": 640,
        "objectives": {
            "draft": {"rl_weight": 0.15},
            "grpo": {"num_generations": 8, "rl_weight": 1.0},
            "dpo": {"num_generations": 8, "rl_weight": 0.2},
            "nft": {"num_generations": 8, "rl_weight": 3.0},
            "rwr": {"num_generations": 8, "rl_weight": 0.2, "rwr_temperature": 0.2},
            "ca_advantage": {"num_generations": 8, "rl_weight": 1.0, "guidance_scale": 1.5},
            "tdm_r1": {"num_generations": 8, "rl_weight": 0.2},
            # These small rewards know no control words: the bare prompt is set against words that they never saw.
            "srpo": {"srpo_positive": [""], "srpo_k": 1.0},
        },
    }

    def __init__(self) -> None:
        for package in ("sklearn", "open_clip"):
            if find_spec(package) is None:
                raise ConfigError(f"model 'digits' needs the package '{package}': pip install 'dmdr[digits]'")

    def folder(self) -> Path:
        """The trained pipeline."""
        from dmdr_digits.cache import cached
        from dmdr_digits.pipeline import build_pipeline

        return cached("pipeline", build_pipeline)

    def prompts(self) -> list[dict[str, Any]]:
        """Ten rows: `prompt`, and the digit as `label`."""
        from dmdr_digits.data import PROMPTS

        return [{"prompt": prompt, "label": label} for label, prompt in enumerate(PROMPTS)]

    def real_images(self) -> Path:
        """A folder of the scans that the teacher was trained on, with their prompts."""
        from dmdr_digits.cache import cached
        from dmdr_digits.data import write_scans

        return cached("scans", write_scans)

    def reward_checkpoint(self, reward: str, *, held_out: bool = False) -> Path | None:
        """A folder in the layout of the published checkpoint; None for a reward not known.

        One that is `held_out` has seen the 597 scans that nothing else is trained on, and no other, from another seed.
        """
        if reward not in REWARDS:
            return None
        from dmdr_digits.cache import cached
        from dmdr_digits.data import held_out_scans, train_scans

        def build(folder: Path) -> None:
            train = held_out_scans() if held_out else train_scans()
            getattr(import_module(REWARDS[reward]), f"build_{reward}")(folder, train)

        return cached(f"reward-{reward}" + "-held-out" * held_out, build, seed=int(held_out))

    def judge(self) -> "DigitJudge":
        """A classifier of real scans."""
        from dmdr_digits.cache import cached
        from dmdr_digits.judge import DigitJudge, build_judge

        return DigitJudge(cached("judge", build_judge))

"""Image grids and evaluations written during a run, of student and teacher, from the same noise each time."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from dmdr import images
from dmdr.evaluation import image_folder
from dmdr.evaluation.evaluate import evaluate
from dmdr.evaluation.guard import Look, thumbnails
from dmdr.prompts import Row, split_columns
from dmdr.protocols import Backend, Denoiser, Judge, grid_of_teacher
from dmdr.randomness import Random
from dmdr.rewards import Rewards
from dmdr.run.device import failing_together, on_main_process, share_of, together
from dmdr.run.examiner import Examiner, numbers
from dmdr.run.folder import check_there
from dmdr.run.job import Job
from dmdr.sampling import FewStepSampler


def teacher_of(backend: Backend, steps: int, guidance: float) -> tuple[Denoiser, FewStepSampler]:
    """The teacher as its users run it: guided, many ODE steps at the model's own times."""
    return partial(backend.teacher, guidance=guidance), FewStepSampler(
        backend.path, grid_of_teacher(backend, steps), 0.0
    )


@dataclass(frozen=True)
class Measurement:
    """What an evaluation found.

    Attributes:
        metrics: By name.
        errors: Standard errors of those that have one.
        look: What the guard sees, where there is a reward.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    look: Look | None = None


@dataclass(frozen=True)
class OfImages:
    """The rewards of a run, asked about images (`evaluation.evaluate.Scorer`): some look at latents even so.

    Attributes:
        size: Images that are encoded at a time.
    """

    rewards: Rewards
    backend: Backend
    size: int

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        """Raw scores by name, each [B] float32, of images [B, 3, H, W]."""
        if not self.rewards.readers(self.backend):
            return self.rewards.each(images, prompts, **columns)
        found = []
        for start in range(0, len(images), self.size):
            part = slice(start, start + self.size)
            cond = self.backend.encode(prompts[part], **{name: column[part] for name, column in columns.items()})
            latents = self.backend.encode_images(images[part])
            found.append(self.rewards.each_of(latents, cond, self.backend, images[part]))
        return {name: torch.cat([scores[name] for scores in found]) for name in found[0]}

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum, [B]."""
        return self.rewards.total(scores)


ABOUT = "about.json"  # of the teacher's images: what they were drawn from
PROMPTS = "prompts"  # of a grid's text: the rows that it shows


class Observer:
    """Draws with the networks as they are, and writes `samples/` and `evaluation.json` of the run folder.

    All processes must call each method together: each draws a share, and the main one writes.

    Attributes:
        sampler: The student's, as its users run it.
        rows: The prompt rows of image grids, --validation_prompts or the run's first.
        eval_rows: Those of evaluations, each prompt several times.
    """

    def __init__(self, job: Job, accelerator: Any, output: Path) -> None:
        self.job, self.accelerator, self.sampler, self.output = job, accelerator, job.user_sampler, output
        self.config = config = job.config
        prompts = job.validation or job.prompts
        least = job.validation.size if job.validation else 0
        self.rows, self._distinct = prompts.first(max(config.sample_images, least)), prompts.size
        again = config.eval_images_per_prompt
        asked = job.prompts.first(math.ceil(config.num_eval_samples / again)) if config.num_eval_samples else []
        self.eval_rows = [row for row in asked for _ in range(again)][: config.num_eval_samples]
        self.examiner: Examiner | None = None
        for plugin in job.settings.of("benchmarks") if self.eval_rows else ():
            benchmark = plugin.called(plugin.cls, plugin.values(config))
            self.examiner = Examiner(benchmark, plugin.title, accelerator, self.eval_rows, self.draw_reference)

    @cached_property
    def judge(self) -> Judge | None:
        """The model's own."""
        return self.job.model.judge() if self.job.model else None

    @property
    def measures(self) -> bool:
        """Whether an evaluation is asked for, and there is anything to measure."""
        parts = (self.job.rewards, self.job.eval_rewards, self.examiner)
        return bool(self.eval_rows) and (any(parts) or self.judge is not None)

    def teacher(self) -> tuple[Denoiser, FewStepSampler]:
        """The teacher of the run's settings."""
        return teacher_of(self.job.backend, self.config.teacher_steps, self.config.guidance_scale)

    @torch.no_grad()
    def generate(
        self, denoiser: Denoiser, sampler: FewStepSampler, rows: list[Row], purpose: str, title: str | None = None
    ) -> Tensor:
        """Images of this process's rows on the CPU, [B, 3, H, W] in [0, 1], the same for the same seed and purpose."""
        backend, random = self.job.backend, Random(self.config.seed, 0, purpose)
        size, own = self.config.per_device_train_batch_size, share_of(self.accelerator, len(rows))
        silent = title is None or not self.accelerator.is_main_process
        found = []
        for start in tqdm(range(0, len(own), size), desc=title, disable=silent, leave=False):
            sample = torch.tensor(own[start : start + size], device=self.accelerator.device)
            shape = (sampler.num_inference_steps, *backend.latent_shape)
            noise = random.normal("noise", sample, shape).transpose(0, 1)
            prompts, columns = split_columns([rows[index] for index in own[start : start + size]])
            cond = backend.encode(prompts, **columns)
            found.append(backend.decode(sampler.rollout(denoiser, noise, cond).final, exact=True).cpu())
        return torch.cat(found)

    def draw_grid(self, step: int) -> dict[str, Image]:
        """Add an image grid of the student after `step` updates, and where there is none the teacher's of its prompts.

        Returns:
            The new ones in the main process, by whose they are.
        """
        rows, distinct = self.rows, self._distinct
        few = distinct is not None and distinct <= 12 and len(rows) % distinct == 0
        columns = distinct if few else None  # a prompt a column
        folder = self.output / "samples"
        told = json.dumps(rows, default=str)

        def draw(whose: str, denoiser: Denoiser, sampler: FewStepSampler, file: str) -> None:
            pictures = together(self.accelerator, self.generate(denoiser, sampler, rows, "grid"), len(rows))
            if self.accelerator.is_main_process:
                grids[whose] = images.image_grid(pictures, columns)
                images.save(grids[whose], folder / file, {PROMPTS: told})

        def drawn() -> bool:
            check_there(self.output)
            return images.text_in(folder / "teacher.png", PROMPTS) == told  # a resumed run may show other prompts

        grids: dict[str, Image] = {}
        if not on_main_process(self.accelerator, drawn):
            draw("teacher", *self.teacher(), "teacher.png")
        draw("student", self.job.backend.student, self.sampler, f"step-{step:06d}.png")
        return grids

    def measure_student(self, title: str) -> Measurement:
        """Its metrics as it is now."""
        return self._measure(title, self.job.backend.student, self.sampler)

    def evaluate_student(self, title: str) -> Look | None:
        """Add its column."""
        measured = self.measure_student(title)
        self._write_column(title, measured)
        return measured.look

    def evaluate_teacher(self) -> None:
        """Add its columns: as its users run it, and in the student's steps."""
        denoiser, sampler = self.teacher()
        samplers = {s.num_inference_steps: s for s in (sampler, self.sampler)}  # of the same steps, the student's
        for steps, chosen in samplers.items():
            title = f"teacher, {steps} step{'s' if steps > 1 else ''}"
            self._write_column(title, self._measure(title, denoiser, chosen))

    def draw_reference(self) -> Path:
        """The folder of the teacher's images that the student's are compared with; they are drawn once."""
        folder, rows, config = self.output / "reference", self.eval_rows, self.config
        about: dict[str, Any] = {"rows": rows, "model": config.model, "revision": config.revision, "seed": config.seed}
        about |= {"teacher_steps": config.teacher_steps, "guidance_scale": config.guidance_scale}
        text = json.dumps(about, default=str, indent=2) + "\n"

        def there() -> bool:
            check_there(self.output)
            return (folder / ABOUT).is_file() and (folder / ABOUT).read_text(encoding="utf-8") == text

        if not on_main_process(self.accelerator, there):
            own = share_of(self.accelerator, len(rows))
            drawn = self.generate(*self.teacher(), rows, "reference", title="draw the teacher's images")
            names = image_folder.names(len(rows))
            with failing_together():  # each process writes its share
                for index, picture in zip(own, images.to_pil(drawn), strict=True):
                    images.save(picture, folder / names[index])

            def complete() -> None:
                for path in set(folder.glob("*.png")) - {folder / name for name in names}:
                    path.unlink()  # of an evaluation of more images
                image_folder.write_index(folder, rows)
                images.write_atomically(folder / ABOUT, text.encode())

            on_main_process(self.accelerator, complete)
        return folder

    def _measure(self, title: str, denoiser: Denoiser, sampler: FewStepSampler) -> Measurement:
        """What judge, rewards and benchmark say of new images."""
        rows = self.eval_rows
        pictures = self.generate(denoiser, sampler, rows, "evaluation", title=f"evaluate {title}")
        prompts, columns = split_columns([rows[index] for index in share_of(self.accelerator, len(rows))])
        everyone = partial(together, self.accelerator, count=len(rows))
        rewards, eval_rewards = (
            each and OfImages(each, self.job.backend, self.config.per_device_train_batch_size)
            for each in (self.job.rewards, self.job.eval_rewards)
        )
        found = evaluate(
            pictures,
            prompts,
            columns,
            self.judge,
            rewards,
            eval_rewards,
            device=self.accelerator.device,
            together=everyone,
        )
        metrics, errors = dict(found.metrics), dict[str, float]()
        if self.examiner:
            values, errors = numbers(self.examiner.title, self.examiner(pictures))
            metrics |= values
        if "reward" not in found.totals:
            return Measurement(metrics, errors)
        totals = {kind: total.cpu() for kind, total in found.totals.items()}
        small = everyone(thumbnails(pictures))
        look = Look([row["prompt"] for row in rows], totals["reward"], small, totals.get("eval_reward"))
        return Measurement(metrics, errors, look)

    def _write_column(self, title: str, measured: Measurement) -> None:
        if not self.accelerator.is_main_process:
            return
        check_there(self.output)
        file = self.output / "evaluation.json"
        found: dict[str, Any] = {"samples": self.config.num_eval_samples, "columns": {}}
        if file.exists():
            found = json.loads(file.read_text())
        found["columns"][title] = measured.metrics
        if self.examiner:
            found.setdefault("errors", {})[title] = measured.errors
            found[self.examiner.title] = self.examiner.benchmark.about()
        images.write_atomically(file, (json.dumps(found, indent=2) + "\n").encode())

"""Images of an export or of a stock pipeline, as its users would draw them: in batches, resumable, by all processes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from dmdr import images
from dmdr.errors import ConfigError
from dmdr.evaluation import image_folder
from dmdr.hub import is_hub_id
from dmdr.prompts import Row, split_columns
from dmdr.protocols import Backend, Denoiser, DrawsNoise, with_options
from dmdr.run.device import avoid_mps, on_main_process, open_accelerator, share_of, together
from dmdr.run.export import ABOUT, is_export, read_export, read_options, resolution_of
from dmdr.run.observer import teacher_of
from dmdr.sampling import FewStepSampler
from dmdr.settings import registry
from dmdr.settings.fields import Config
from dmdr.settings.models import Model, pipeline_class
from dmdr.settings.parse import read_yaml
from dmdr.settings.trust import require_installed

KEY = "dmdr"  # of a PNG's text
BATCH = 16  # images
UNUSED: Mapping[str, Any] = {  # what only training needs, and may be gone by now
    "teacher": None,  # the base of an export
    "student_weights": None,
    "reward_vae": None,
    "gradient_checkpointing": False,
    "torch_compile": False,
    "prompt_cache": "off",
    "cpu_offload": False,
    "quantize": None,
    "fake_score": "lora",
}


@dataclass(frozen=True)
class Artist:
    """A student or a teacher with its sampler.

    Attributes:
        family: Prepared.
        denoiser: What it draws with.
        about: What an image tells of it, beside its prompt and seed.
    """

    family: Backend
    denoiser: Denoiser
    sampler: FewStepSampler
    accelerator: Accelerator
    about: Mapping[str, Any]

    def draw(self, rows: Sequence[Row], seed: int, output: Path, *, batch_size: int = BATCH) -> list[Path]:
        """Write an image of each prompt row, with an index of the rows (`evaluation.image_folder`).

        Args:
            rows, seed, batch_size: As of `write`.
            output: Folder of the images.

        Returns: The paths in the main process; none in the others.
        """
        self.write(rows, seed, [output / name for name in image_folder.names(len(rows))], batch_size=batch_size)
        return image_folder.write_index(output, rows) if self.accelerator.is_main_process else []

    def write(self, rows: Sequence[Row], seed: int, files: Sequence[Path], *, batch_size: int = BATCH) -> None:
        """Write an image of each prompt row.

        A batch is what the stock pipeline draws when it is called with its prompts after all batches before, with one
        seed at the start. Batches whose images are there already, drawn from the same settings, are left out. Each
        process draws a share of every batch; the main one writes.

        Args:
            rows: At least one.
            seed: Of torch's generator.
            files: PNG file of each row.
            batch_size: Images that are drawn at a time.
        """
        main = self.accelerator.is_main_process
        told = [self._told(rows, i, seed, batch_size) for i in range(len(rows))]
        batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]

        def missing() -> list[bool]:  # or torn, or of other settings
            return [not all(images.text_in(files[i], KEY) == told[i] for i in batch) for batch in batches]

        due = on_main_process(self.accelerator, missing)
        torch.manual_seed(seed)
        hidden = None if main else True  # None: where there is no terminal
        bar = tqdm(total=len(rows), desc="draw", unit="image", leave=False, disable=hidden)
        with torch.no_grad(), bar:
            for batch, wanted in zip(batches, due, strict=True):
                steps = range(self.sampler.num_inference_steps)
                noise = [self._noise(step, len(batch)) for step in steps]  # also of what is there: the next ones follow
                if wanted:
                    pictures = self._batch([rows[i] for i in batch], noise)
                    for i, picture in zip(batch, images.to_pil(pictures), strict=True) if main else ():
                        images.save(picture, files[i], {"prompt": rows[i]["prompt"], KEY: told[i]})
                bar.update(len(batch))

    def _batch(self, rows: Sequence[Row], noise: Sequence[Tensor]) -> Tensor:
        """Images of all rows on the CPU."""
        own = share_of(self.accelerator, len(rows))
        prompts, columns = split_columns([rows[index] for index in own])
        cond = self.family.encode(prompts, **columns)
        rollout = self.sampler.rollout(self.denoiser, [each[own] for each in noise], cond)
        return together(self.accelerator, self.family.decode(rollout.final, exact=True).cpu(), len(rows))

    def _noise(self, step: int, count: int) -> Tensor:
        if isinstance(self.family, DrawsNoise):
            return self.family.draw_noise(step, count)
        return torch.randn((count, *self.family.latent_shape), device=self.accelerator.device)

    def _told(self, rows: Sequence[Row], index: int, seed: int, batch_size: int) -> str:
        """What an image is a function of, as JSON."""
        batch, row = divmod(index, batch_size)
        size = min(batch_size, len(rows) - batch * batch_size)
        place = {"seed": seed, "batch": batch, "row": row, "batch_size": size}
        return json.dumps({"prompt_row": dict(rows[index]), **place, **self.about}, default=str)


def open_place(
    place: str,
    *,
    teacher: bool = False,
    guidance_scale: float | None = None,
    lora: str | None = None,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    **how: Any,
) -> Artist:
    """The student or the teacher of a run or export, or a stock pipeline.

    Args:
        place: Run folder, its export, or a pipeline's folder or hub id.
        teacher: Draw with the run's teacher instead of its student.
        guidance_scale: Of the teacher, by default as in the run; of a pipeline it must be given.
        lora: On a pipeline.
        model: Folder or hub id of the teacher, if it has moved.
        options: Options of the model family that differ from the run's.
        how: `backend`, `mixed_precision` and `num_inference_steps`, as of `open_export` and `open_pipeline`.

    Raises:
        ConfigError: If there is no such student or pipeline, or a flag is not read.
    """
    folder = export_in(place)
    options = dict(options or {})
    if folder is None:
        if not is_pipeline(place):
            what = "is neither an export nor a run folder with one (no sampling.json), nor a pipeline"
            raise ConfigError(f"{place} {what} (no model_index.json)")
        if model or teacher:
            raise ConfigError(f"--{'model' if model else 'teacher'} is not read for a pipeline; leave it out")
        if guidance_scale is None:
            raise _without_guidance(place)
        options |= {"teacher_lora": lora} if lora else {}
        return open_pipeline(place, options=options, guidance_scale=guidance_scale, **how)
    if lora:
        raise ConfigError("--lora is read for a pipeline alone; leave it out")
    if guidance_scale is not None and not teacher:
        raise ConfigError("--guidance_scale is read with --teacher alone; a student is not guided")
    guidance = guidance_scale if guidance_scale is not None else _guidance_of(folder) if teacher else 1.0
    how |= {"teacher": teacher, "guidance_scale": guidance}
    return open_export(folder, read_export(folder), model=model, options=options, **how)


def _without_guidance(place: str) -> ConfigError:
    if Path(place).exists():
        return ConfigError(f"--guidance_scale is missing: {place} is a pipeline")
    return ConfigError(f"no such folder: {place} (if it is a pipeline of the hub, give --guidance_scale)")


def require_guidance(place: str, guidance_scale: float | None) -> None:
    """Refuse a pipeline whose guidance nobody says, before anything is drawn.

    Raises:
        ConfigError: Names the flag.
    """
    if guidance_scale is None and export_in(place) is None and is_pipeline(place):
        raise _without_guidance(place)


def export_in(place: str) -> Path | None:
    """The export that a place is, or that lies in a run folder; None where there is none."""
    return next(filter(is_export, (Path(place), Path(place) / "student")), None)


def is_pipeline(place: str) -> bool:
    """Whether a place is the folder of a stock pipeline, or a hub id."""
    return (Path(place) / "model_index.json").is_file() or (not Path(place).exists() and is_hub_id(place))


def _guidance_of(export: Path) -> float:
    """The teacher's guidance in the run that an export lies in."""
    file = export.resolve().parent / "config.yaml"
    found = read_yaml(str(file)).get("guidance_scale") if file.is_file() else None
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise ConfigError(f"--guidance_scale is missing: {export} lies in no run folder that says it")
    return float(found)


def open_export(
    folder: Path,
    about: Mapping[str, Any],
    *,
    model: str | None = None,
    backend: str | None = None,
    mixed_precision: str | None = None,
    options: Mapping[str, Any] | None = None,
    num_inference_steps: int | None = None,
    teacher: bool = False,
    guidance_scale: float = 1.0,
) -> Artist:
    """The student of an export, or its teacher.

    Args:
        folder, about: The export, and what it says of itself (`run.export.read_export`).
        model: Folder or hub id of the teacher, if it has moved.
        backend: Model family in a file or module.
        mixed_precision: Of the networks; the run's by default.
        options: Options of the model family that differ from the run's.
        num_inference_steps: Steps at the family's own times; those of the training by default.
        teacher: Draw with the teacher instead, by ODE steps at the model's own times.
        guidance_scale: Of the teacher.

    Raises:
        ConfigError: If the export or its teacher cannot be loaded, or the family does not read an option.
    """
    base = model or about["base_model"]
    # As it was trained, also where the model that it is drawn with now has another resolution of its own.
    values = {**about["options"], **UNUSED, "resolution": resolution_of(about)}
    if model or about["options"].get("teacher"):
        values["revision"] = None  # which was of another place
    cls = family_of(folder, about, backend, base, values.get("revision"))
    trained = read_options(folder, cls.Options, values)
    precision = mixed_precision or about["mixed_precision"]
    chosen = _changed(trained, options or {}, str(folder))
    if teacher:
        chosen = with_options(chosen, guidance_scale=guidance_scale)
    family, accelerator = _prepared(cls, base, chosen, precision)
    told = {"model": base, "mixed_precision": precision, "dmdr": version("dmdr")} | dict(options or {})
    if teacher:
        return _teacher(family, accelerator, num_inference_steps, guidance_scale, told)
    family.load_export(folder)
    times = torch.tensor(about["grid"], dtype=torch.float64)
    if num_inference_steps:
        times = family.grid(num_inference_steps)
    sampler = FewStepSampler.stock(family.path, times, about["sample_eta"])
    told |= {"student": str(folder), "files": weights_in(folder), "grid": times.tolist(), "eta": about["sample_eta"]}
    return Artist(family, family.student, sampler, accelerator, told)


def open_pipeline(
    model: str,
    *,
    backend: str | None = None,
    mixed_precision: str | None = None,
    options: Mapping[str, Any] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
) -> Artist:
    """A stock pipeline, guided, by ODE steps at its own times.

    Args:
        model: Folder or hub id.
        backend: Model family; by default that of the pipeline's class.
        mixed_precision: Of the networks; bf16 on a GPU by default.
        options: Of the model family.
        num_inference_steps, guidance_scale: As its users choose them.

    Raises:
        ConfigError: If there is no such pipeline, or the family does not read an option.
    """
    cls: Any
    _, cls = Model(model).family(backend, None, None)
    # Guidance may be an input of the network, which the family then reads as an option.
    chosen = _changed(with_options(cls.Options, **UNUSED, guidance_scale=guidance_scale), options or {}, model)
    family, accelerator = _prepared(cls, model, chosen, mixed_precision)
    told = {"model": model, "mixed_precision": accelerator.mixed_precision, "dmdr": version("dmdr")}
    return _teacher(family, accelerator, num_inference_steps, guidance_scale, told | dict(options or {}))


def _changed(options: Any, asked: Mapping[str, Any], whose: str) -> Any:
    """Options with those that the user asks for; a family must read them."""
    for name in asked:
        if name not in {f.name for f in fields(options) if f.init}:
            raise ConfigError(f"--{name}: the model family of {whose} does not read it; leave it out")
    return replace(options, **asked)


def _prepared(cls: Any, base: str, options: Any, precision: str | None) -> tuple[Any, Accelerator]:
    avoid_mps()
    family, accelerator = cls(base, options), open_accelerator(precision)
    family.prepare(accelerator, roles=("student",))
    return family, accelerator


def _teacher(family: Any, accelerator: Accelerator, steps: int | None, guidance: float, told: dict[str, Any]) -> Artist:
    denoiser, sampler = teacher_of(family, steps or Config.teacher_steps, guidance)
    told = told | {"grid": sampler.t.tolist(), "guidance_scale": guidance}
    return Artist(family, denoiser, sampler, accelerator, told)


def weights_in(folder: Path) -> dict[str, list[int]]:
    """Size and time of the weights in a folder, by which what they draw is told from what others did."""
    found = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): [f.stat().st_size, f.stat().st_mtime_ns] for f in found}


def family_of(folder: Path, about: Mapping[str, Any], named: str | None, base: str, revision: str | None) -> Any:
    """The class of the model family: the one that the user names, or else an installed one.

    Args:
        folder, about: The export, and what it says of itself.
        named: By the user.
        base, revision: The teacher.

    Raises:
        ConfigError: If the export or the teacher's folder names a file or module, whose code may be a stranger's.
    """
    if named:
        return registry.load("backends", named)
    told = about["backend"]
    name = told or pipeline_class(base, revision)
    place = folder / ABOUT if told else f"{base}/model_index.json"
    require_installed("backends", name, place, f"if you trust its code, add --backend {name}")
    return registry.load("backends", name)

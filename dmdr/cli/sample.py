"""`dmdr-sample`: few-step images from a run folder or an export."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dmdr.cli.common import CommandParser, command
from dmdr.errors import ConfigError

OPTIONS = ("cpu_offload", "quantize", "resolution")  # of model families, which need not be those of the run
MOST = 100_000  # images of a prompt, which are drawn as one batch


def arguments() -> CommandParser:
    parser = CommandParser(prog="dmdr-sample", description=__doc__)
    parser.add_argument("student", help="run folder, or the student/ folder of one")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument("--prompts", help="one prompt a line, or rows with columns, as dmdr-train reads them")
    parser.add_argument("--prompt_column", default="prompt", help="column of --prompts that holds the prompts")
    parser.add_argument("--num_images", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed, as torch.manual_seed takes it (default: 0)")
    parser.add_argument(
        "--output_dir", default="samples", help="folder of the PNG files and their metadata.jsonl (default: samples)"
    )
    parser.add_argument("--model", help="folder or hub id of the teacher, if it has moved since the export")
    parser.add_argument(
        "--backend", help="model family that was trained, if it is in a file or module, e.g. my_file.py:NAME"
    )
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16", "fp16"), help="precision of the networks (default: the run's)"
    )
    parser.add_argument(
        "--cpu_offload", action="store_true", help="keep text encoders and VAE on the CPU while they are idle"
    )
    parser.add_argument("--resolution", help="image size, such as 1024 or 1152x896 (default: the run's first)")
    parser.add_argument(
        "--quantize", choices=("nf4", "int8", "fp8"), help="keep the network's blocks in 4 or 8 bits a number"
    )
    return parser


def run(argv: list[str]) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    # torch is imported only after the flags have been found good
    from dmdr.evaluation import image_folder
    from dmdr.prompts import read_prompts
    from dmdr.run.export import is_export, read_export

    folder = next(filter(is_export, (Path(args.student), Path(args.student) / "student")), None)
    if folder is None:
        raise ConfigError(f"{args.student} is neither an export nor a run folder with one (no sampling.json)")
    rows = [{"prompt": prompt} for prompt in args.prompt]
    rows += read_prompts(args.prompts, column=args.prompt_column, repeated=True).rows if args.prompts else []
    if not rows:
        raise ConfigError("nothing to sample: give --prompt or --prompts")
    if not 1 <= args.num_images <= MOST:
        raise ConfigError(f"--num_images must be between 1 and {MOST:,}, not {args.num_images}")
    if not -(2**63) <= args.seed < 2**64:
        raise ConfigError(f"--seed must be between -2**63 and 2**64 - 1, not {args.seed}")
    if "," in (args.resolution or ""):
        raise ConfigError(f"--resolution {args.resolution}: give one size")
    rows = [row for row in rows for _ in range(args.num_images)]
    about = read_export(folder)
    image_folder.check_place(Path(args.output_dir), rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [columns | row for row in rows]
    options = {name: value for name in OPTIONS if (value := getattr(args, name))}
    how = {"backend": args.backend, "mixed_precision": args.mixed_precision, "options": options}
    for path in sample_export(folder, about, rows, args.seed, args.model, Path(args.output_dir), **how):
        print(path)


def sample_export(
    folder: Path,
    about: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    seed: int,
    model: str | None,
    output: Path,
    *,
    backend: str | None = None,
    mixed_precision: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Sample an export with our own sampler, drawing noise in the order in which the stock pipeline does.

    Each process draws a share; the main one writes the images with an index of their prompt rows
    (`evaluation.image_folder`), and returns their paths.

    Args:
        folder, about: The export, and what it says of itself.
        rows: Prompt rows, one for each image.
        seed: Of torch's generator.
        model: Folder or hub id of the teacher, if it has moved.
        output: Where to.
        backend: Model family in a file or module.
        mixed_precision: Of the networks; the run's by default.
        options: Options of the model family that differ from the run's.

    Raises:
        ConfigError: If the export or its teacher cannot be loaded, or the family does not read an option.
    """
    import torch

    from dmdr import images
    from dmdr.evaluation import image_folder
    from dmdr.prompts import split_columns
    from dmdr.protocols import DrawsNoise
    from dmdr.run.device import avoid_mps, open_accelerator, share_of, together
    from dmdr.run.export import read_options, resolution_of
    from dmdr.sampling import FewStepSampler

    avoid_mps()
    base = model or about["base_model"]
    values = about["options"] | {  # what only training needs may be gone by now
        "student_weights": None,
        "reward_vae": None,
        "gradient_checkpointing": False,
        "torch_compile": False,
        "prompt_cache": "off",
        "cpu_offload": False,
        "quantize": None,
        # As it was trained, also where the model that it is drawn with now has another resolution of its own.
        "resolution": resolution_of(about),
    }
    if model:
        values["revision"] = None  # which was of where it lay before
    cls = family_of(folder, about, backend, base, values.get("revision"))
    trained = read_options(folder, cls.Options, values)
    for name in options or ():
        if name not in {f.name for f in fields(trained) if f.init}:
            raise ConfigError(f"--{name}: the model family of {folder} does not read it; leave it out")
    family = cls(base, replace(trained, **options or {}))
    accelerator = open_accelerator(mixed_precision or about["mixed_precision"])
    family.prepare(accelerator, roles=("student",))
    family.load_export(folder)
    sampler = FewStepSampler.stock(family.path, torch.tensor(about["grid"], dtype=torch.float64), about["sample_eta"])
    torch.manual_seed(seed)
    own = share_of(accelerator, len(rows))
    prompts, columns = split_columns([rows[index] for index in own])
    shape = (len(rows), *family.latent_shape)
    plainly = lambda step, count: torch.randn(shape, device=accelerator.device)  # noqa: E731
    draw_noise = family.draw_noise if isinstance(family, DrawsNoise) else plainly
    with torch.no_grad():
        cond = family.encode(prompts, **columns)
        noise = [draw_noise(step, len(rows))[own] for step in range(sampler.num_inference_steps)]
        pictures = family.decode(sampler.rollout(family.student, noise, cond).final, exact=True)
    pictures = together(accelerator, pictures.cpu(), len(rows))
    accelerator.end_training()  # or a thread between processes may outlive the interpreter, and abort it
    return image_folder.save_images(output, images.to_pil(pictures), rows) if accelerator.is_main_process else []


def family_of(folder: Path, about: dict[str, Any], named: str | None, base: str, revision: str | None) -> Any:
    """The class of the model family: the one that the user names, or else an installed one.

    Args:
        folder, about: The export, and what it says of itself.
        named: By the user.
        base, revision: The teacher.

    Raises:
        ConfigError: If the export or the teacher's folder names a file or module, whose code may be a stranger's.
    """
    from dmdr.run.export import ABOUT
    from dmdr.settings import registry
    from dmdr.settings.models import pipeline_class
    from dmdr.settings.trust import require_installed

    if named:
        return registry.load("backends", named)
    told = about["backend"]
    name = told or pipeline_class(base, revision)
    place = folder / ABOUT if told else f"{base}/model_index.json"
    require_installed("backends", name, place, f"if you trust its code, add --backend {name}")
    return registry.load("backends", name)


def main() -> None:
    sys.exit(command(run))


if __name__ == "__main__":
    main()

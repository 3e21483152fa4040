"""`dmdr-sample`: images of a run folder, an export or a stock pipeline."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr.cli.common import CommandParser, command
from dmdr.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from dmdr.run.drawing import Artist

OPTIONS = ("cpu_offload", "quantize", "resolution")  # of the model family; the others are those of the run
MOST = 100_000  # images of a command


def arguments() -> CommandParser:
    parser = CommandParser(prog="dmdr-sample", description=__doc__)
    parser.add_argument("student", help="run folder, or the student/ folder of one; or a pipeline's folder or hub id")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument("--prompts", help="one prompt a line, or rows with columns, as dmdr-train reads them")
    parser.add_argument("--prompt_column", default="prompt", help="column of --prompts that holds the prompts")
    parser.add_argument("--num_images", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed, as torch.manual_seed takes it (default: 0)")
    parser.add_argument("--batch_size", type=int, default=16, help="images that are drawn at a time (default: 16)")
    parser.add_argument(
        "--output_dir",
        default="samples",
        help="folder of the PNG files and their metadata.jsonl (default: samples); images of the same settings that "
        "are there already are kept",
    )
    parser.add_argument("--num_inference_steps", type=int, help="steps (default: the student's own; 28 of a teacher)")
    parser.add_argument("--teacher", action="store_true", help="draw with the run's teacher instead of its student")
    parser.add_argument(
        "--guidance_scale", type=float, help="guidance of the teacher (default: that of the run); needed for a pipeline"
    )
    parser.add_argument("--lora", help="LoRA on a pipeline: a file, folder or hub id")
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
    args = arguments().parse_args(argv)
    check(args)
    # torch is imported only after the flags have been found good
    from dmdr.evaluation import image_folder
    from dmdr.prompts import read_prompts

    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in args.prompt]
    rows += read_prompts(args.prompts, column=args.prompt_column, repeated=True).rows if args.prompts else []
    if not rows:
        raise ConfigError("nothing to sample: give --prompt or --prompts")
    rows = [row for row in rows for _ in range(args.num_images)]
    if len(rows) > MOST:
        raise ConfigError(f"--num_images {args.num_images}: {len(rows):,} images are more than {MOST:,}")
    image_folder.check_place(Path(args.output_dir), rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    artist = opened(args)
    try:
        paths = artist.draw(
            [columns | row for row in rows], args.seed, Path(args.output_dir), batch_size=args.batch_size
        )
    except KeyboardInterrupt:
        print(f"dmdr-sample: stopped; the same command goes on with {args.output_dir}", file=sys.stderr)
        raise
    finally:
        artist.accelerator.end_training()  # or a thread between processes may outlive the interpreter, and abort it
    for path in paths:
        print(path)


def check(args: "argparse.Namespace") -> None:
    """Refuse values that no command could have.

    Raises:
        ConfigError: Names the flag.
    """
    if "," in (args.resolution or ""):
        raise ConfigError(f"--resolution {args.resolution}: give one size")
    if not 1 <= args.num_images <= MOST:
        raise ConfigError(f"--num_images must be between 1 and {MOST:,}, not {args.num_images}")
    for name in ("batch_size", "num_inference_steps"):
        if (value := getattr(args, name)) is not None and not 1 <= value <= 1000:
            raise ConfigError(f"--{name} must be between 1 and 1000, not {value}")
    if args.guidance_scale is not None and not 0 <= args.guidance_scale <= 1000:
        raise ConfigError(f"--guidance_scale must be between 0 and 1000, not {args.guidance_scale}")
    if not -(2**63) <= args.seed < 2**64:
        raise ConfigError(f"--seed must be between -2**63 and 2**64 - 1, not {args.seed}")


def opened(args: "argparse.Namespace") -> "Artist":
    """Who draws.

    Raises:
        ConfigError: If there is no such student or pipeline, or a flag is not read.
    """
    from dmdr.run.drawing import open_place

    names = ("teacher", "guidance_scale", "lora", "model", "backend", "mixed_precision", "num_inference_steps")
    options = {name: value for name in OPTIONS if (value := getattr(args, name)) not in (None, False)}
    return open_place(args.student, options=options, **{name: getattr(args, name) for name in names})


def main() -> None:
    sys.exit(command(run))


if __name__ == "__main__":
    main()

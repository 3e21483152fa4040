"""`dmdr-train init`: a file of settings to begin with, for a model and a GPU."""

import dataclasses
import os
import textwrap
from pathlib import Path

import yaml

from dmdr import images
from dmdr.errors import ConfigError
from dmdr.settings.fields import Config
from dmdr.settings.parse import Settings, parse
from dmdr.settings.parser import help_of

USAGE = """
dmdr-train init --model FOLDER_OR_ID --gpu_memory 24 [--rl NAME --reward NAME ...] [--output run.yaml] writes a file for
dmdr-train --config: with the guidance of the model's own pipeline, with what makes the run fit in so many GiB
(estimated, without weights), and with the settings that are changed most often. All other flags of dmdr-train work.
"""
OFTEN = (
    *("model", "prompts", "rl", "reward", "guidance_scale", "num_inference_steps", "stage1_steps", "stage2_steps"),
    *("resolution", "learning_rate", "fake_learning_rate", "lora_rank", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "mixed_precision", "save_steps", "sample_steps", "num_eval_samples"),
)
WIDTH = 118


def init(arguments: list[str]) -> None:
    """Write the file, and say how to go on.

    Raises:
        ConfigError: If there is such a file, or the run is one that --dry_run refuses.
        SystemExit: After printing `--help`.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE.strip())
        raise SystemExit(0)
    arguments, output = _without_output(arguments)
    if output.exists() or not os.access(output.absolute().parent, os.W_OK):
        raise ConfigError(f"--output {output}: there is such a file, or none can be written there; name another")
    from dmdr.dry_run.estimate import estimate
    from dmdr.dry_run.fit import fitted
    from dmdr.run.pace import GIB

    dry = ["--dry_run", "true"]
    settings = parse([*arguments, *dry])
    arguments += _usual(settings)
    settings = parse([*arguments, *dry])
    found, said = estimate(settings), ""
    if settings.config.gpu_memory:
        fit = fitted(found, settings, lambda flags: estimate(parse([*arguments, *dry, *flags])))
        found, said = fit.estimate, str(fit)
        settings = parse([*arguments, *dry, *fit.flags])
    memory = f"{found.total() / GIB:.1f} GiB of a GPU"
    images.write_atomically(output, _text(settings, f"{found.what}: {memory}").encode())
    print(said or f"estimated: {memory}")
    prompts = "" if settings.config.prompts else " --prompts prompts.txt"
    print(f"written: {output}; go on with\n  dmdr-train --config {output}{prompts} --output_dir runs/first")


def _without_output(arguments: list[str]) -> tuple[list[str], Path]:
    """The arguments of `dmdr-train`, and the file to write."""
    rest, output = [], "run.yaml"
    left = iter(arguments)
    for argument in left:
        name, is_given, value = argument.partition("=")
        if name != "--output":
            rest.append(argument)
        elif not (output := value if is_given else next(left, "")):
            raise ConfigError("--output needs the name of a file")
    return rest, Path(output)


def _usual(settings: Settings) -> list[str]:
    """Flags that a model's own pipeline, or a GPU, has usually, where the user has not said them."""
    from dmdr.backends.pipeline import PipelineBackend
    from dmdr.protocols import with_options

    told = settings.told.typed | settings.told.in_file
    flags = [] if "mixed_precision" in told else ["--mixed_precision", "bf16"]
    if settings.model.cls is None and "guidance_scale" not in told:  # a registered model has a recipe
        options = with_options(settings.family_options(), guidance_scale=1.0)  # which no model refuses
        backend = settings.open_backend(settings.config.architecture or settings.config.model, options)
        own = backend.own_guidance() if isinstance(backend, PipelineBackend) else None
        flags += [] if own is None else ["--guidance_scale", f"{own:g}"]
    return flags


def _text(settings: Settings, what: str) -> str:
    """The file: each setting below its description."""
    values, told = settings.values(), settings.told.typed | settings.told.in_file
    names = [name for name in dict.fromkeys([*OFTEN, *values]) if name in told or name in OFTEN]
    described = _descriptions(settings)
    parts = [f"# {what}, estimated by dmdr-train --dry_run"]
    for name in names:
        if name not in values or (values[name] is None and name != "prompts"):
            continue
        line = yaml.safe_dump({name: values[name]}, sort_keys=False)
        about = textwrap.fill(described.get(name, ""), WIDTH, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{about}\n{line}".lstrip())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _descriptions(settings: Settings) -> dict[str, str]:
    """What `--help` says of each setting."""
    found = {f.name: str(f.metadata["help"]) for f in dataclasses.fields(Config)}
    for plugin in settings.plugins:
        texts = help_of(plugin.flags)
        found |= {plugin.key(f.name): texts.get(f.name, "") for f in plugin.own_flags}
    return {name: text.replace("%%", "%") for name, text in found.items()}

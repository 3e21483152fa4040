"""The export of a student, which stock diffusers loads without this package."""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dmdr.errors import ConfigError, one_line, printable
from dmdr.hub import is_hub_id
from dmdr.protocols import LORA_FILE, Backend, Sampler, sizes_of
from dmdr.run import durable
from dmdr.settings.fields import typed
from dmdr.sizes import Size

ABOUT = "sampling.json"
KEYS = {"base_model", "backend", "sample_eta", "grid", "call", "mixed_precision", "options"}

CARD = """\
---
{% if base_model %}{{ base_model }}
{% endif -%}
library_name: diffusers
tags: [distillation, dmd, {{ "lora" if lora else "full-finetune" }}]
---
# A {{ steps }}-step student of {{ name | code }}

Distilled{% if aligned %} and aligned ({{ aligned }}){% endif %} with DMDR {{ version }}.
It inherits the licence of {{ name | code }}
{%- if start %}, and that of {{ start | code }}, from which the student started{% endif %}
{%- if rewards %}; the rewards it was tuned on have licences of their own{% endif %}.

{{ fence }}python
{{ snippet }}
{{ fence }}

{% if sizes %}The student was trained at {{ sizes }} pixels (width x height).
{% endif -%}
`sampling.json` holds the call arguments that no scheduler configuration can hold; the student was trained on exactly
that grid. Sampling {{ "draws fresh noise at every step" if stochastic else "is deterministic given the first noise" }}.
"""


def export(
    folder: Path,
    backend: Backend,
    sampler: Sampler,
    *,
    base: str,
    family: str | None,
    name: str,
    prompt: str,
    mixed_precision: str,
    objectives: str,
    rewards: str,
    start: str = "",
) -> Path:
    """Write the student's export, replacing an older one only when the new one is complete.

    Args:
        folder: Where to, usually `<run>/student`.
        base: Folder or hub id of the teacher.
        family: Name of the backend, where it is not that of the teacher's class.
        name: What users call it.
        prompt: Example of the model card.
        mixed_precision: Of the run, and of whoever samples it unless they choose another.
        objectives, rewards: Expressions of the run, for the model card; empty if it had none.
        start: What users call the model that the student started from, where that is not the teacher.
    """
    import jinja2  # only who writes an export waits for it

    partial = durable.begin(folder)
    call = dict(backend.export(partial, sampler))
    about = {"base_model": base, "backend": family, "sample_eta": sampler.eta, "grid": sampler.t.tolist(), "call": call}
    about |= {"mixed_precision": mixed_precision, "options": asdict(backend.options)}
    (partial / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    text = jinja2.Environment()
    text.filters["code"] = code_span
    snippet = backend.snippet(base, prompt, sampler)
    card = text.from_string(CARD).render(
        name=name,
        base_model=_base_model(name),
        steps=len(sampler.t) - 1,
        aligned=" on ".join(code_span(names) for names in (objectives, rewards) if names) if objectives else "",
        rewards=rewards,
        start=start,
        version=version("dmdr"),
        snippet=snippet,
        fence="`" * max(3, _longest_run(snippet) + 1),
        lora=(partial / LORA_FILE).exists(),
        sizes=" and ".join(map(str, sizes)) if len(sizes := sizes_of(backend)) > 1 else "",
        stochastic=sampler.eta > 0 and len(sampler.t) > 2,
    )
    (partial / "README.md").write_bytes(card.encode("utf-8", "backslashreplace"))  # a file's name need not be text
    durable.finish(partial, folder)
    return folder


def _base_model(name: str) -> str:
    """The teacher in a card's metadata; the hub refuses cards that name another than one of its own models."""
    if not is_hub_id(name) or Path(name).exists():
        return ""
    return yaml.safe_dump({"base_model": name}, width=math.inf).strip()


def code_span(text: str) -> str:
    """Text as Markdown shows it letter by letter, whatever it holds: names are users' own."""
    text = printable(" ".join(text.split()))
    fence = "`" * (_longest_run(text) + 1)
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def _longest_run(text: str) -> int:
    """Backticks in a row."""
    return max(map(len, re.findall("`+", text)), default=0)


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, not a run or a checkpoint."""
    return (folder / ABOUT).is_file()


def read_export(folder: Path) -> dict[str, Any]:
    """How an export is sampled, as `export` wrote it.

    Raises:
        ConfigError: If the file is damaged.
    """
    file = folder / ABOUT
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        missing = KEYS - about.keys()
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged: {one_line(error)}") from error
    if missing:
        raise ConfigError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    for what, holds in _sound(about).items():
        if not holds:
            raise ConfigError(f"{file} is damaged: its {what}")
    return dict(about)


def resolution_of(about: Mapping[str, Any]) -> str | None:
    """The image sizes of an export's run, as --resolution names them; None where its family has none.

    Args:
        about: As `read_export` returns it.
    """
    told, call = about["options"].get("resolution"), about["call"]
    if told is None and None not in (sides := (call.get("width"), call.get("height"))):  # the model's own
        told = Size(*sides)
    return None if told is None else str(told)


def _sound(about: Mapping[str, Any]) -> dict[str, bool]:
    """What can be wrong with an export's file, and whether it is right."""
    grid, eta, call = (about[key] for key in ("grid", "sample_eta", "call"))
    falls = isinstance(grid, list) and len(grid) > 1 and all(map(_is_number, grid)) and grid[0] <= 1
    sides = [call.get(name) for name in ("height", "width")] if isinstance(call, dict) else []
    return {
        "base_model is no text": isinstance(about["base_model"], str),
        "backend is neither a name nor null": isinstance(about["backend"], str | None),
        "mixed_precision is none of no, bf16 and fp16": about["mixed_precision"] in ("no", "bf16", "fp16"),
        "call is no table": isinstance(call, dict),
        "options is no table": isinstance(about["options"], dict),
        "call has a height or width that is no whole number above 0": all(
            side is None or (type(side) is int and side > 0) for side in sides
        ),
        "grid does not fall from 1 or below to 0": falls and grid[-1] == 0 and all(a > b for a, b in pairwise(grid)),
        "sample_eta is not in [0, 1]": _is_number(eta) and 0 <= eta <= 1,
    }


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold; JSON has truth values, NaN and whole numbers of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_options(folder: Path, kind: Any, values: Mapping[str, Any]) -> Any:
    """The options of a model family, from those that an export keeps; others than the family's are left out.

    Args:
        folder: The export.
        kind: The family's `Options`.
        values: By name.

    Raises:
        ConfigError: If one is missing, of another type, or refused by the family.
    """
    file, hints, given = folder / ABOUT, get_type_hints(kind), {}
    for f in fields(kind):
        if f.init and f.name in values:
            given[f.name] = typed(f"{file} is damaged: its option {f.name}", values[f.name], hints[f.name])
        elif f.init and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{file} is damaged: it lacks the option {f.name}")
    try:
        return kind(**given)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error

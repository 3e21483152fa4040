"""The export of a student, which stock diffusers loads without this package."""

import json
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

from dmdr.errors import ConfigError
from dmdr.protocols import LORA_FILE, Backend, Sampler
from dmdr.run import durable

ABOUT = "sampling.json"
KEYS = {"base_model", "backend", "sample_eta", "grid", "call", "mixed_precision", "options"}

CARD = """\
---
base_model: {{ name }}
library_name: diffusers
tags: [distillation, dmd, {{ "lora" if lora else "full-finetune" }}]
---
# A {{ steps }}-step student of {{ name }}

Distilled{% if objectives %} and aligned ({{ objectives }} on {{ rewards }}){% endif %} with DMDR {{ version }}.
It inherits the licence of {{ name }}
{%- if rewards %}; the rewards it was tuned on have licences of their own{% endif %}.

```python
{{ snippet }}
```

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
    """
    partial = durable.begin(folder)
    call = dict(backend.export(partial, sampler))
    about = {"base_model": base, "backend": family, "sample_eta": sampler.eta, "grid": sampler.t.tolist(), "call": call}
    about |= {"mixed_precision": mixed_precision, "options": asdict(backend.options)}
    (partial / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    card = jinja2.Template(CARD).render(
        name=name,
        steps=len(sampler.t) - 1,
        objectives=objectives,
        rewards=rewards,
        version=version("dmdr"),
        snippet=backend.snippet(base, prompt, sampler),
        lora=(partial / LORA_FILE).exists(),
        stochastic=sampler.eta == 1 and len(sampler.t) > 2,
    )
    (partial / "README.md").write_text(card)
    durable.finish(partial, folder)
    return folder


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
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
    if missing:
        raise ConfigError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    for key in ("call", "options"):
        if not isinstance(about[key], dict):
            raise ConfigError(f"{file} is damaged: its {key} is no table")
    grid = about["grid"]
    numbers = isinstance(grid, list) and len(grid) > 1 and all(isinstance(t, int | float) for t in grid)
    if not numbers or grid[-1] != 0 or not all(1 >= t > later for t, later in pairwise(grid)):
        raise ConfigError(f"{file} is damaged: its grid does not fall from 1 or below to 0")
    if not isinstance(about["sample_eta"], int | float) or not 0 <= about["sample_eta"] <= 1:
        raise ConfigError(f"{file} is damaged: its sample_eta is not in [0, 1]")
    return dict(about)

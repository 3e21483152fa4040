"""The export of a student, which stock diffusers loads without this package."""

import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import jinja2

from dmdr.protocols import LORA_FILE, Backend, Sampler

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
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    call = dict(backend.export(partial, sampler))
    about = {"base_model": base, "backend": family, "sample_eta": sampler.eta, "grid": sampler.t.tolist(), "call": call}
    about |= {"mixed_precision": mixed_precision, "options": asdict(backend.options)}
    (partial / "sampling.json").write_text(json.dumps(about, indent=2) + "\n")
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
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder

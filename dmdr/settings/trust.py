"""What a folder may name. Anybody may have written it: a plugin that it names must be an installed one.

A file or a module would run its code as soon as it is named, and an address would be sent the user's token. Only the
user names those: by a flag, from Python, or in the file of `--config`.
"""

from collections.abc import Mapping
from typing import Any

from dmdr.errors import ConfigError
from dmdr.settings import kinds, registry
from dmdr.settings.chosen import parts_of

# Where a run writes to is never among the settings that it keeps: who finds one there would lose another folder to it.
# Nor is what only --dry_run reads.
PLACES = ("dry_run", "gpu_memory", "architecture", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")


def require_installed(group: str, name: str, place: object, cure: str) -> None:
    """Refuse a file, a module or an address that a folder names.

    Args:
        group: That of the registry.
        name: What the folder names.
        place: The file that names it, for the message.
        cure: What the user can do who trusts it.

    Raises:
        ConfigError: Unless it is the name of an installed plugin, or could be no other.
    """
    if ":" in name and not registry.is_installed(group, name):
        raise ConfigError(f"{place} names the {kinds.NOUNS[group]} '{name}', which is not installed; {cure}")


def check_config(file: str, held: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Refuse what the settings of a run folder may not say.

    Args:
        file: The folder's `config.yaml`.
        held: All that it says.
        used: Those of its settings that no flag replaces.

    Raises:
        ConfigError: If it names other than installed plugins, or says where to write or to upload.
    """
    cure = f"if you trust this folder, add --config {file}"
    for name in PLACES:
        if name in held:
            raise ConfigError(f"{file} sets '{name}', which only the command line may set; {cure}")
    if used.get("push_to_hub"):
        raise ConfigError(f"{file} would have your student uploaded to the hub, which only you may ask for; {cure}")
    named = [(group.removeprefix("eval_"), term.name) for group, term in parts_of(used)]
    if used.get("backend") is not None:
        named.append(("backends", str(used["backend"])))
    for group, name in named:
        require_installed(group, name, file, cure)

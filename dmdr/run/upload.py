"""The student on the hub (--push_to_hub): what can be checked before a run begins, and the upload of its export."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from dmdr.errors import ConfigError, TrainingError, one_line
from dmdr.hub import unreachable
from dmdr.settings.fields import Config


@dataclass(frozen=True)
class Upload:
    """Where the student goes.

    Attributes:
        repository: Its id, `owner/name`; made where it is not there.
        private: Whether a new one is private; None as the owner has set it.
    """

    repository: str
    private: bool | None

    def __call__(self, folder: Path) -> str:
        """Upload the files of a folder.

        Returns:
            The address of the repository.

        Raises:
            TrainingError: Says what failed, and the command that repeats the upload alone.
        """
        from huggingface_hub import create_repo, upload_folder

        try:
            made = create_repo(self.repository, private=self.private, exist_ok=True)
            upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Student of a DMDR run")
        except Exception as error:  # of the network, the hub, its library
            raise TrainingError(
                f"{folder} is whole, but was not uploaded to {self.repository}: {one_line(error)}; repeat the upload "
                f"with: {self.command(folder)}"
            ) from error
        return str(made)

    def command(self, folder: Path) -> str:
        """What does the same in a shell."""
        flags = {None: "", True: " --private", False: " --no-private"}[self.private]
        return f"hf upload {self.repository} {shlex.quote(str(folder.absolute()))} .{flags}"


def open_upload(config: Config, output: Path) -> Upload | None:
    """The upload that a run ends with, if it is asked for; makes and sends nothing.

    Args:
        output: The run folder, whose name is the repository's by default.

    Raises:
        ConfigError: If the hub is out of reach or does not take the token, or no repository can have the name.
    """
    if not config.push_to_hub:
        return None
    from huggingface_hub import get_token, whoami
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = config.hub_model_id or output.absolute().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--hub_model_id: {one_line(error)}") from error
    if why := unreachable():
        raise ConfigError(f"--push_to_hub: {why}")
    if get_token() is None:
        raise ConfigError("--push_to_hub: there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN")
    try:
        user = whoami()
    except Exception as error:  # of the network and the hub
        raise ConfigError(f"--push_to_hub: the hub does not take the token: {one_line(error)}") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError("--push_to_hub: the token of the hub may only read; log in with one that may write")
    return Upload(name if "/" in name else f"{user['name']}/{name}", config.hub_private_repo)

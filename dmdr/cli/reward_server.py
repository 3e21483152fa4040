"""`dmdr-reward-server`: rewards behind an address, for `--reward http://HOST:PORT`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dmdr.cli.common import command, open_rewards
from dmdr.errors import ConfigError
from dmdr.settings.fields import REQUIRED, RewardFlags, flag
from dmdr.settings.parse import parse_command

LIMITS = ("max_batch_size", "max_queue", "max_request_mb", "request_timeout")
DESCRIPTION = (
    "Serve rewards, which resize as their published evaluations do, to dmdr-train --reward http://HOST:PORT. Requests "
    "must have the bearer token in the environment variable DMDR_REWARD_TOKEN, if it is set."
)


@dataclass(kw_only=True)
class ServerFlags(RewardFlags):
    """The flags of the command."""

    reward: str = flag(REQUIRED, "sum of rewards, e.g. 'hps+0.5*clip'")
    host: str = flag("127.0.0.1", "interface; anything but the loopback is open to others")
    port: int = flag(8000, "TCP port; 0 is a free one")
    max_batch_size: int = flag(32, "images that are scored at a time; larger requests are split, small ones merged")
    max_queue: int = flag(64, "requests that may wait; more are told to come back")
    max_request_mb: float = flag(64.0, "size of a request in MiB")
    request_timeout: float = flag(120.0, "seconds until a request that is not scored is given up")

    def validate(self) -> None:
        super().validate()
        for name in LIMITS:
            self._require(getattr(self, name) > 0, name, "above 0")
        self._require(0 <= self.port < 65536, "port", "between 0 and 65535")


def run(arguments: list[str]) -> None:
    flags, chosen = parse_command(ServerFlags, arguments, prog="dmdr-reward-server", description=DESCRIPTION)
    try:
        from dmdr.remote.server import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"a reward server needs the package '{error.name}': pip install 'dmdr[remote]'") from error
    from dmdr.rewards import RewardError  # torch, only after the flags have been found good

    rewards, device = open_rewards(flags, chosen)

    def score(images: Any, prompts: Sequence[str], **columns: Sequence[Any]) -> Any:
        try:
            return rewards(images.to(device), prompts, **columns)
        except RewardError as error:
            if isinstance(error.__cause__, ValueError):  # about the client's images, which the server tells by its type
                raise ValueError(str(error)) from error
            raise

    limits = {name: getattr(flags, name) for name in LIMITS}
    columns = dict.fromkeys(name for reward in chosen for name in getattr(reward.cls, "columns", ()))
    serve(score, host=flags.host, port=flags.port, name=flags.reward, columns=tuple(columns), **limits)


def main() -> None:
    sys.exit(command(run))


if __name__ == "__main__":
    main()

"""`dmdr-train`: distil and align in one run."""

import logging
import os
import sys

from dmdr.cli.common import Line, command, say
from dmdr.settings.parse import parse

INIT = "init"


def run(arguments: list[str]) -> None:
    if arguments[:1] == [INIT]:
        from dmdr.cli.init import init

        return init(arguments[1:])
    settings = parse(arguments, beginning=_say_beginning)
    from accelerate import PartialState

    from dmdr.run.run import run

    if settings.config.dry_run:
        from dmdr.dry_run.estimate import estimate
        from dmdr.dry_run.fit import fitted

        found = estimate(settings)
        print(found)
        if settings.config.gpu_memory:
            print(fitted(found, settings, lambda flags: estimate(parse([*arguments, *flags]))))
        print("nothing was loaded, nothing was written")
        return
    handler = logging.StreamHandler()
    handler.setFormatter(Line("%(message)s"))
    logging.basicConfig(handlers=[handler])
    if _is_first():
        logging.getLogger("dmdr").setLevel(logging.INFO)

    folder = run(settings)
    if PartialState().is_main_process:
        print(f"done: {folder}/report.html")


def _say_beginning(what: str) -> None:
    """The first sign of life, seconds before the log begins; whoever has torch already does not wait for it."""
    if _is_first() and "torch" not in sys.modules:
        say(f"{what}; loading torch and the plugins")


def _is_first() -> bool:
    """Whether this is the main process, as launchers say it."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    sys.exit(command(run))


if __name__ == "__main__":
    main()

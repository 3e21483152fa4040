"""`dmdr-plugins`: what is installed, and where it comes from."""

import argparse
import sys

from dmdr import registry
from dmdr.cli.common import command, refuse


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dmdr-plugins", description=__doc__, allow_abbrev=False)
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)
    rows = [plugin for group in registry.GROUPS for plugin in registry.plugins(group).values()]
    widths = [max(len(cell) for cell in column) for column in zip(*map(cells, rows), strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells(row), widths, strict=True)).rstrip())


def cells(plugin: registry.Plugin) -> tuple[str, str, str, str]:
    return plugin.group[:-1], plugin.name, f"{plugin.distribution} {plugin.version}", plugin.target


def main() -> None:
    sys.exit(command(run))


if __name__ == "__main__":
    main()

"""`dmdr-plugins`: what is installed, and where it comes from; `check` tries it, and `new NAME` begins a plugin."""

import ast
import keyword
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import dmdr
from dmdr.cli.common import CommandParser, command
from dmdr.errors import ConfigError
from dmdr.settings import kinds, registry

# By kind: the example that is copied, and of each plugin in it the group, the name, the class and the new name.
TEMPLATES = {
    "objective": (
        "plugin_template",
        [("objectives", "target_score", "TargetScore", "{}"), ("rewards", "brightness", "Brightness", "{}_reward")],
    ),
    "matching": ("matching_template", [("matchings", "unit_dmd", "UnitDMD", "{}")]),
    "reward": ("reward_template", [("rewards", "brightness", "Brightness", "{}")]),
    "benchmark": ("benchmark_template", [("benchmarks", "brightness", "Brightness", "{}")]),
}


def run(arguments: list[str]) -> None:
    parser = CommandParser(prog="dmdr-plugins", description=__doc__)
    actions = parser.add_subparsers(dest="action", title="actions", metavar="check | new NAME")
    check = actions.add_parser("check", help="say whether plugins work, and which optional methods they have")
    check.add_argument("names", nargs="*", metavar="NAME", help="of plugins; all by default")
    new = actions.add_parser("new", help="write a package with a plugin to start from")
    new.add_argument("name", help="what users will type, as in --rl NAME; the package is called dmdr-NAME")
    kinds = "what the plugin is (default: objective, with a reward NAME_reward beside it)"
    new.add_argument("--kind", choices=TEMPLATES, default="objective", help=kinds)
    new.add_argument("--output_dir", type=Path, help="folder to write; by default the name, with - for _")
    given = parser.parse_args(arguments)
    if given.action == "new":
        write_package(given.name, given.output_dir, given.kind)
    elif given.action == "check":
        if broken := check_plugins(given.names):
            raise ConfigError(f"check: plugins that do not work: {broken}; the list says why")
    else:
        list_plugins()


def list_plugins() -> None:
    """A line a plugin, from what its distribution says of itself."""
    for _, line in _lines().values():
        print(line)
    _print_strays()
    print("dmdr-plugins check [NAME ...] says whether they work")


def _lines() -> dict[registry.Plugin, tuple[str, str]]:
    """What users type for each plugin, and its line."""
    names = {plugin: name for group in kinds.GROUPS for plugin, name in registry.typed_names(group).items()}
    cells = {p: (p.group[:-1], name, f"{p.distribution} {p.version}", p.target) for p, name in names.items()}
    widths = [max(len(cell) for cell in column) for column in zip(*cells.values(), strict=True)]
    return {
        plugin: (row[1], "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for plugin, row in cells.items()
    }


def _print_strays() -> None:
    for _, complaint in registry.strays():
        print(f"warning: {complaint}", flush=True)


def check_plugins(names: Sequence[str] = ()) -> int:
    """A line a plugin, with the optional protocols that it has; one that cannot be used, or looks odd, says why.

    Args:
        names: Of those to check, as users type them; all by default.

    Returns:
        How many cannot be used.

    Raises:
        ConfigError: If there is none of a name.
    """
    lines = _lines()
    known = [name for name, _ in lines.values()]
    for name in names:
        if name not in known:
            raise ConfigError(f"check {name}: no plugin has this name{registry.suggest(name, known)}")
    count = 0
    for plugin, (name, line) in lines.items():
        if names and name not in names:
            continue
        with redirect_stdout(sys.stderr):  # what a module prints when it is imported
            broken = registry.problem(plugin)
            cls = None if broken else registry.imported(plugin)
            optional = kinds.optional_protocols(plugin.group, cls) if cls else []
            doubts = kinds.doubts(plugin.group, cls) if cls else []
        count += broken is not None
        said = f"  broken: {' '.join(broken.split())}" if broken else ""
        print(line + (f"  ({', '.join(optional)})" if optional else "") + said, flush=True)
        for doubt in doubts:
            print(f"  warning: {plugin.group[:-1]} '{name}' {doubt}", flush=True)
    _print_strays()
    return count


def template(kind: str = "objective") -> Path:
    """The example package: beside the core in a checkout, within it where it is installed."""
    package, name = Path(dmdr.__file__).parent, TEMPLATES[kind][0]
    return next(folder for folder in (package / name, package.parent / "examples" / name) if folder.is_dir())


def names_used(kind: str) -> set[str]:
    """Names that the template's code reads, but for the classes that are renamed."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in template(kind).rglob("*.py")]
    names = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names - {old for _, _, old, _ in TEMPLATES[kind][1]}


def title_of(name: str) -> str:
    """The name of a class: my_objective is MyObjective."""
    return "".join(part.capitalize() for part in name.split("_"))


def write_package(name: str, folder: Path | None, kind: str = "objective") -> None:
    """Copy the template of a kind under another name.

    Raises:
        ConfigError: If the name is none, is taken, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ConfigError(f"new {name}: a name has lower-case letters, digits and _, as in my_objective")
    for word in (name, title_of(name)):  # none and true are no keywords, but the classes would be called None and True
        if keyword.iskeyword(word):
            raise ConfigError(f"new {name}: '{word}' is a word of Python; choose another name")
        if word in names_used(kind):
            raise ConfigError(f"new {name}: the package's code already uses '{word}'; choose another name")
    renamed = {"dmdr-template": f"dmdr-{name.replace('_', '-')}", "dmdr_template": f"dmdr_{name}"}
    for group, old, cls, form in TEMPLATES[kind][1]:
        new = form.format(name)
        renamed |= {old: new, cls: title_of(new)}
        if taken := registry.plugins(group).get(new):
            raise ConfigError(f"new {name}: {taken} has this name; choose another")
    if find_spec(f"dmdr_{name}"):
        raise ConfigError(f"new {name}: there is a package dmdr_{name} already; choose another name")
    folder = folder or Path(name.replace("_", "-"))
    if folder.exists():
        raise ConfigError(f"new {name}: {folder} exists; choose another with --output_dir")
    words = re.compile("|".join(map(re.escape, renamed)))
    for source in sorted(template(kind).rglob("*")):
        path = source.relative_to(template(kind))
        if source.is_dir() or path.suffix == ".pyc":
            continue
        target = folder / words.sub(lambda match: renamed[match[0]], str(path))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"new {name}: {folder} cannot be written: {error.strerror}") from error
        target.write_text(
            words.sub(lambda match: renamed[match[0]], source.read_text(encoding="utf-8")), encoding="utf-8"
        )
        print(target)


def main() -> None:
    sys.exit(command(run))


if __name__ == "__main__":
    main()

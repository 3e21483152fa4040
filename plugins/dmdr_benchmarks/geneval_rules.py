"""The rules of GenEval, on what a detector has found, and the rows that they apply to.

Source: Ghosh et al. 2023, arXiv:2310.11513, and evaluation/evaluate_images.py of github.com/djghosh13/geneval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dmdr.errors import ConfigError
from dmdr_benchmarks.detector import CLASSES, COLOURS, Found

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # scores are above
MOST = 16  # objects of a class
MARGIN = 0.1  # of the sizes of two boxes, by which their distance must exceed it

Row = Mapping[str, Any]
NameColours = Callable[[Sequence[Found], str], Sequence[str]]


def kept(found: Sequence[Found], tag: str) -> dict[str, list[Found]]:
    """The objects that count, by class, best first: those above the threshold of the tag, and 16 of a class at most."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda one: -one.score):
        if one.score > threshold and len(objects.setdefault(one.label, [])) < MOST:
            objects[one.label].append(one)
    return objects


def lacks(row: Row, objects: Mapping[str, Sequence[Found]], name_colours: NameColours) -> str:
    """What an image lacks of what its row asks for, a line each, in the words of the published scorer.

    Args:
        row: With `include` and perhaps `exclude`.
        objects: By class, best first.
        name_colours: The colour of each of some objects of a class.

    Returns: Nothing if the image is right.
    """
    reasons: list[str] = []
    groups: list[Sequence[Found] | None] = []
    for wanted in row["include"]:
        label, count = wanted["class"], wanted["count"]
        best = objects.get(label, [])[:count]
        reason = ""
        if len(best) < count:
            reason = f"expected {label}>={count}, found {len(best)}"
        elif "color" in wanted:
            reason = _wrong_colour(wanted, name_colours(best, label))
        if not reason and "position" in wanted:
            reason = _wrong_place(wanted, best, groups[wanted["position"][1]])
        groups.append(None if reason else best)
        reasons += [reason] * bool(reason)
    for unwanted in row.get("exclude", []):
        found = len(objects.get(unwanted["class"], []))
        if found >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {found}")
    return "\n".join(reasons)


def relations(a: Found, b: Found) -> list[str]:
    """Where `a` is as seen from `b`: none, one or two of `RELATIONS`; y points down.

    The distance of the centres is shortened by a tenth of both sizes, per axis. What is left must be more than half of
    the whole distance.
    """
    offset = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a.box[i + 2] - a.box[i]) + abs(b.box[i + 2] - b.box[i]) for i in (0, 1)]
    left = [max(abs(o) - MARGIN * size, 0) for o, size in zip(offset, sizes, strict=True)]
    if max(left) < 1e-3:
        return []
    dx, dy = (math.copysign(value, o) / math.hypot(*offset) for value, o in zip(left, offset, strict=True))
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return [relation for relation, true in zip(RELATIONS, holds, strict=True) if true]


def _wrong_colour(wanted: Row, colours: Sequence[str]) -> str:
    label, count, colour = wanted["class"], wanted["count"], wanted["color"]
    if colours.count(colour) >= count:
        return ""
    seen = ", ".join(f"{colours.count(one)} {one}" for one in COLOURS if one in colours)
    return f"expected {colour} {label}>={count}, found {colours.count(colour)} {colour}; and {seen}"


def _wrong_place(wanted: Row, objects: Sequence[Found], targets: Sequence[Found] | None) -> str:
    """Each object must be so placed towards each of the targets, which must be right themselves."""
    label, relation = wanted["class"], wanted["position"][0]
    if targets is None:
        return f"no target for {label} to be {relation}"
    for one in objects:
        for target in targets:
            found = relations(one, target)
            if relation not in found:
                return f"expected {label} {relation} target, found {' and '.join(found)} target"
    return ""


# --- Rows -------------------------------------------------------------------------------------------------------------


def without_nulls(value: Any) -> Any:
    """Tables have all keys in all rows."""
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def check(row: Row, where: str) -> None:
    """Refuse a row that asks for something unknown.

    Raises:
        ConfigError: Names the place, what it holds, and what it may hold.
    """

    def require(holds: bool, what: str, value: Any, may_be: str) -> None:
        if not holds:
            raise ConfigError(f"{where}: {what} must be {may_be}, not {value!r:.80}")

    require(row.get("tag") in TAGS, "tag", row.get("tag"), f"one of {', '.join(TAGS)}")
    include, exclude = row.get("include"), row.get("exclude", [])
    require(isinstance(include, list) and bool(include), "include", include, "a list of at least one object")
    require(isinstance(exclude, list), "exclude", exclude, "a list of objects")
    for name, wanted in [("include", include), ("exclude", exclude)]:
        for i, one in enumerate(wanted):
            at = f"{name}[{i}]"
            require(isinstance(one, dict), at, one, "an object with class and count")
            label, count = one.get("class"), one.get("count")
            require(label in CLASSES, f"class of {at}", label, "one of COCO's 80, by GenEval's names")
            require(type(count) is int and count > 0, f"count of {at}", count, "a whole number of at least 1")
            colour, place = one.get("color", COLOURS[0]), one.get("position")
            require(colour in COLOURS, f"color of {at}", colour, f"one of {', '.join(COLOURS)}")
            fits = place is None or (
                isinstance(place, list)
                and len(place) == 2
                and place[0] in RELATIONS
                and type(place[1]) is int
                and 0 <= place[1] < i
            )
            may_be = f"[one of {', '.join(RELATIONS)}; index of an earlier object]"
            require(fits, f"position of {at}", place, may_be)

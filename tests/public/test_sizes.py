"""Image sizes as users write them."""

import pytest

from dmdr.sizes import Size, join_sizes, parse_sizes


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1024", [(1024, 1024)]),
        ("1152x896", [(1152, 896)]),
        ("1024x1024, 1152 x 896,896x1152", [(1024, 1024), (1152, 896), (896, 1152)]),
    ],
)
def test_sizes(text: str, sizes: list[tuple[int, int]]) -> None:
    found = parse_sizes(text)
    assert list(found) == sizes and found[-1].width == sizes[-1][0]
    assert parse_sizes(join_sizes(found)) == found


def test_a_size_is_named_once() -> None:
    with pytest.raises(ValueError, match=r"^different sizes$"):
        parse_sizes("1024,512,1024x1024")


def test_as_users_write_them() -> None:
    assert join_sizes((Size(1024, 1024), Size(1152, 896))) == "1024,1152x896"


@pytest.mark.parametrize("text", ["", "0", "-512", "1024x", "x512", "1024x0", "512.5", "1024;512", "512,"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"^sizes such as 1024 or 1152x896 \(width x height\)"):
        parse_sizes(text)

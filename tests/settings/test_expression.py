import pytest

from dmdr.settings.expression import parse_sum


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("0.3*hps+0.3*clip", [(0.3, "hps"), (0.3, "clip")]),
        ("hps+clip", [(1.0, "hps"), (1.0, "clip")]),
        ("  .5 * hps +\t2.*my-reward_2.1 ", [(0.5, "hps"), (2.0, "my-reward_2.1")]),
        ("0.5*'my_file.py:score'+hps", [(0.5, "my_file.py:score"), (1.0, "hps")]),
        ("0.5*my_file.py:score+~/a/b-c.py:f", [(0.5, "my_file.py:score"), (1.0, "~/a/b-c.py:f")]),
        ("""'a+0.5*b'+1e+1*"c/d's" """, [(1.0, "a+0.5*b"), (10.0, "c/d's")]),
        ("1e-3*hps+1e+2*clip", [(0.001, "hps"), (100.0, "clip")]),
        ("a1e+2*b", [(1.0, "a1e"), (2.0, "b")]),  # the exponent of a weight is not the end of a name
    ],
)
def test_reads_weights_and_names(text: str, terms: list[tuple[float, str]]) -> None:
    assert parse_sum(text) == [(weight, name, name) for weight, name in terms]


def test_a_term_may_have_a_label() -> None:
    text = "hps as pref + 0.1*http://host:8000  as  judge+'my as file.py:f' as f_2+ hps"
    assert parse_sum(text) == [
        (1.0, "hps", "pref"),
        (0.1, "http://host:8000", "judge"),
        (1.0, "my as file.py:f", "f_2"),
        (1.0, "hps", "hps"),
    ]


@pytest.mark.parametrize(
    ("text", "problem", "character"),
    [
        ("+hps", "empty term", 1),
        ("hps + ", "empty term", 7),
        ("hps++clip", "empty term", 5),
        ("''", "empty term", 1),
        ("hps+0.5*", "no reward after the weight", 5),
        ("hps+ x*clip", "'x' is no weight", 6),
        ("hps*0.3", "'hps' is no weight", 1),
        ("1_0*hps", "'1_0' is no weight", 1),
        ("*hps", "'' is no weight", 1),
        ("0.5*0.5*hps", "cannot be read", 1),
        ("-0.5*hps", "-0.5 of 'hps' must be above 0", 1),
        ("0*hps", "0 of 'hps' must be above 0", 1),
        ("hps+nan*clip", "nan of 'clip' must be above 0", 5),
        ("inf*hps", "inf of 'hps' must be above 0", 1),
        ("1e400*hps", "1e400 of 'hps' must be above 0", 1),
        ("hps+0.5*'hps'", "'hps' is named twice", 5),
        ("hps+'clip", "unbalanced quote", 5),
        ("my file.py:score", "'my file.py:score' is no name; put", 1),
        ("hps clip", "'hps clip' is no name", 1),
        ("hps as a+clip as a", "'a' is named twice", 10),
        ("clip+hps as clip", "'clip' is named twice", 6),
        ("hps as 2nd", "'2nd' is no label", 1),
        ("hps as my-label", "'my-label' is no label", 1),
        ("hps as a as b", "'a as b' is no label", 1),
        ("hps as", "'hps as' is no name", 1),
        ("hps as total", "already has the name 'total'", 1),
        ("hps as 'a'", "cannot be read", 1),
    ],
)
def test_says_what_is_wrong_and_where(text: str, problem: str, character: int) -> None:
    with pytest.raises(ValueError, match="expression") as caught:
        parse_sum(text)
    message = str(caught.value)
    assert problem in message
    assert message.endswith(f"(at character {character})")
    assert "\n" not in message


def test_names_what_it_reads() -> None:
    with pytest.raises(ValueError, match="the objective expression is empty"):
        parse_sum(" ", "objective")
    with pytest.raises(ValueError, match=r"^objective expression 'grpo\+2\*': no objective after the weight"):
        parse_sum("grpo+2*", "objective")

"""What an answer of a chat-completions server says as a number."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?![\w.]*\w)")  # not in a name such as gpt-4o or v1.5.2


class Unreadable(ValueError):
    """An answer without a score, and why."""


def choice_of(content: bytes) -> Mapping[str, Any]:
    """The first choice of an answer's body.

    Raises:
        Unreadable: If it has none.
    """
    try:
        choice = json.loads(content)["choices"][0]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise Unreadable("the answer has no choices in JSON") from error
    if not isinstance(choice, Mapping):
        raise Unreadable("the answer's first choice is no object")
    return choice


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a choice.

    Raises:
        Unreadable: If it has none, as where the model refuses or only thinks.
    """
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise Unreadable("the answer has no text")
    return text


def has_logprobs(choice: Mapping[str, Any]) -> bool:
    """Whether the server says how probable its first token and the alternatives were."""
    try:
        return isinstance(choice["logprobs"]["content"][0]["top_logprobs"], list)
    except (LookupError, TypeError):
        return False


def probability_of_yes(choice: Mapping[str, Any]) -> float:
    """How probable it was that the answer begins with "yes", in [0, 1].

    It is the sum over the alternatives for the first token that are "yes" but for case and spaces. The server tells the
    most probable ones only, so it may be a little too low.

    Raises:
        Unreadable: If there are no log-probabilities, one is no number, or neither "yes" nor "no" is among the tokens.
    """
    if not has_logprobs(choice):
        raise Unreadable("the answer has no log-probabilities")
    first = choice["logprobs"]["content"][0]
    try:
        chances = {str(one["token"]): float(one["logprob"]) for one in (*first["top_logprobs"], first)}
    except (LookupError, TypeError, ValueError) as error:
        raise Unreadable("a log-probability is no number") from error
    if any(math.isnan(chance) or chance == math.inf for chance in chances.values()):
        raise Unreadable("a log-probability is no number")
    words = {token: token.strip().lower() for token in chances}
    if not {"yes", "no"} & set(words.values()):
        raise Unreadable("the answer begins with neither yes nor no")
    return min(1.0, sum(math.exp(min(0.0, chances[token])) for token, word in words.items() if word == "yes"))


def number_in(text: str, pattern: re.Pattern[str] | None, scale: Sequence[float]) -> float:
    """The score in a text.

    Args:
        text: The answer.
        pattern: With one group, or none; the score is the mean of all that it finds. Without a pattern, the text must
            hold just one number.
        scale: The least and the largest number.

    Raises:
        Unreadable: If there is no number, more than one without a pattern, or one outside of the scale.
    """
    found = [match[match.re.groups] for match in (pattern or NUMBER).finditer(text)]
    if not found or (pattern is None and len(found) > 1):
        raise Unreadable(f"the answer holds {len(found) or 'no'} number{'s' * (len(found) > 1)}")
    try:
        numbers = [float(each) for each in found]
    except (TypeError, ValueError) as error:
        raise Unreadable("what the pattern finds is no number") from error
    if not all(scale[0] <= number <= scale[1] for number in numbers):  # of NaN, too
        raise Unreadable(f"a number is not between {scale[0]:g} and {scale[1]:g}")
    return sum(numbers) / len(numbers)

"""A vision-language model as a judge: it is asked about each image, on any server that speaks OpenAI's chat format."""

import base64
import json
import logging
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.images import to_pil
from dmdr.remote.http import AGAIN, Answer, RemoteError, Server, checked_token, checked_url, in_thread
from dmdr_vlm.answers import Unreadable, choice_of, has_logprobs, number_in, probability_of_yes, text_of

logger = logging.getLogger("dmdr")

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
TOP_LOGPROBS = 20  # the most that OpenAI and, unless it is told otherwise, vLLM give
ABOUT_THE_IMAGE = (400, 413, 422)  # refusals such as of a content filter: one image has no score
MOST_SAID = 10  # reasons without a score that are told, once each
JSON = "application/json"


@dataclass
class VLM:
    """What a vision-language model answers about an image, by a server of vLLM, SGLang, llama.cpp or a vendor.

    The server needs `POST /chat/completions` as OpenAI defines it. An image is sent as PNG. An answer that cannot be
    read is an image without a score (NaN). A server that does not answer is asked again and waited for.

    Attributes:
        base_url: Of the server, up to and with /v1.
        model: What the server calls the model; its only one by default.
        question: Text with {prompt}, and {name} for a column of the prompt rows; a row without the column's value has
            no score. By default VQAScore's question, to be answered by yes or no.
        answer: "yes_or_no": the score is the probability, in [0, 1], that the answer begins with yes. "number": it is
            the number in the answer.
        scale: Of "number", the least and the largest number, as the question says them.
        pattern: Of "number", a regular expression whose group is the number, such as 'Final Score: ([0-9.]+)'; the mean
            if it finds several. By default the answer must hold just one number.
        max_tokens: Of "number", tokens of an answer at most; 512 by default.
        extra_body: JSON object of further fields of a request, such as '{"chat_template_kwargs": {"enable_thinking":
            false}}'.
        api_key_env: The environment variable that holds the API key; none is sent by default.
        max_concurrency: Requests at a time.
        reward_timeout: Seconds to go on trying a server that does not answer, before the run saves and stops.
        request_timeout: Seconds that one try may take.

    Raises:
        ConfigError: For a value that cannot be used; names the option.

    Source: the question and the probability of yes are VQAScore's (Lin et al. 2024, arXiv:2404.01291).
    """

    differentiable: ClassVar[bool] = False
    base_url: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    question: str | None = None
    answer: Literal["yes_or_no", "number"] = "yes_or_no"  # a bare yes is true in YAML
    scale: list[float] | None = None
    pattern: str | None = None
    max_tokens: int | None = None
    extra_body: str | None = None
    api_key_env: str | None = None
    max_concurrency: int = 16
    reward_timeout: float = 600.0
    request_timeout: float = 120.0
    columns: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("reward_timeout", "request_timeout", "max_concurrency"):
            if not getattr(self, name) > 0:
                raise _refusal(f"{name} must be above 0, not {getattr(self, name)}")
        if self.answer == "number":
            self._check_number()
        elif self.answer != "yes_or_no":
            raise _refusal(f"answer must be 'yes_or_no' or 'number', not {self.answer!r}")
        elif unread := [name for name in ("scale", "pattern", "max_tokens") if getattr(self, name) is not None]:
            raise _refusal(f"{unread[0]} is of answer 'number' only; leave it out, or set answer to 'number'")
        self._url = checked_url(
            self.base_url,
            f"reward vlm: base_url must be a URL such as http://127.0.0.1:8000/v1, not {self.base_url!r}",
            "the variable that api_key_env names",
        )
        self._extra = _object(self.extra_body)
        self._question = QUESTION if self.question is None else self.question
        names = re.findall(r"\{(\w+)\}", self._question)
        self.columns = tuple(dict.fromkeys(name for name in names if name != "prompt"))
        self._pattern = None if self.pattern is None else _compiled(self.pattern)
        self._said: set[str] = set()
        self._server: Server | None = None

    def _check_number(self) -> None:
        if self.question is None:
            raise _refusal("question is missing: answer 'number' needs one that asks for a number")
        if self.scale is None or len(self.scale) != 2 or not -math.inf < self.scale[0] < self.scale[1] < math.inf:
            raise _refusal(f"scale must be the least and the largest number of an answer, not {self.scale}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _refusal(f"max_tokens must be at least 1, not {self.max_tokens}")

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Find the model, and ask it about a grey image.

        Raises:
            ConfigError: If nothing answers, the key is missing, the model is unknown or not said, the server refuses,
                or it gives no log-probabilities where these are needed.
        """
        key = "" if self.api_key_env is None else os.environ.get(self.api_key_env, "")
        if self.api_key_env is not None and not key:
            raise ConfigError(f"the environment variable {self.api_key_env}, which api_key_env names, is not set")
        token = checked_token(key, str(self.api_key_env))
        again = (*AGAIN, 408, 500, 529)  # that of a vendor who has too much to do
        server = Server(self._url, self.reward_timeout, self.request_timeout, token, again)
        models = server.greet("/models")
        self._model = _only_model(models, self._url) if self.model is None else self.model
        self._turns = threading.Semaphore(self.max_concurrency)
        self._server = server
        grey = Image.new("RGB", (64, 64), (128, 128, 128))
        try:
            answer = self._ask(grey, QUESTION.replace("{prompt}", "a grey square"))
        except RemoteError as error:
            raise ConfigError(str(error)) from error
        if answer.status != 200:
            raise ConfigError(f"{self._url} answers {answer}, to a question about a grey image to {self._model}")
        try:
            choice = choice_of(answer.content)
        except Unreadable as error:
            raise ConfigError(f"{self._url} answers 200, but not as OpenAI's chat completions do: {error}") from error
        if self.answer == "yes_or_no" and not has_logprobs(choice):
            raise ConfigError(
                f"{self._url} gives no log-probabilities of {self._model}, from which answer 'yes_or_no' is read; "
                "use a server that does, or answer 'number'"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1], B prompts and the columns of the question -> [B] float32, NaN without a score.

        Raises:
            RemoteError: If the server refuses the key or the request, or does not answer within `reward_timeout`
                seconds.
        """
        return self.submit(images, prompts, **columns).result()

    def submit(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Future[Tensor]:
        """The same, without waiting for it.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        if self._server is None:
            raise RuntimeError("VLM has no server yet; call prepare(device, dtype) first")
        rows = [
            {"prompt": prompt} | {name: columns[name][i] for name in self.columns} for i, prompt in enumerate(prompts)
        ]
        waiting = [
            in_thread(partial(self._in_turn, picture, row)) for picture, row in zip(to_pil(images), rows, strict=True)
        ]
        device = images.device
        return in_thread(lambda: torch.tensor([each.result() for each in waiting], dtype=torch.float32, device=device))

    def _in_turn(self, picture: Image.Image, row: Mapping[str, Any]) -> float:
        with self._turns:
            try:
                return self._score(picture, row)
            except Unreadable as error:
                if str(error) not in self._said and len(self._said) < MOST_SAID:  # the log of the run counts on
                    self._said.add(str(error))
                    logger.warning("%s: an image has no score: %s", self._url, error)
                return math.nan

    def _score(self, picture: Image.Image, row: Mapping[str, Any]) -> float:
        if missing := [name for name in self.columns if row[name] is None]:
            raise Unreadable(f"its row has nothing in the column '{missing[0]}'")
        question = re.sub(r"\{(\w+)\}", lambda name: str(row[name[1]]), self._question)
        answer = self._ask(picture, question)
        if answer.status in ABOUT_THE_IMAGE:
            raise Unreadable(f"the server answers {answer}")
        if answer.status != 200:
            raise RemoteError(f"{self._url} answers {answer}")
        choice = choice_of(answer.content)
        if self.answer == "yes_or_no":
            return probability_of_yes(choice)
        assert self.scale is not None
        return number_in(text_of(choice), self._pattern, self.scale)

    def _ask(self, picture: Image.Image, question: str) -> Answer:
        assert self._server is not None
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        wanted: dict[str, Any] = {"model": self._model, "messages": [{"role": "user", "content": content}]}
        wanted["temperature"] = 0
        if self.answer == "yes_or_no":
            wanted |= {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        else:
            wanted["max_tokens"] = self.max_tokens or 512
        with self._server.session() as session:
            return self._server.ask(session, "/chat/completions", json.dumps(wanted | self._extra).encode(), JSON)


def _only_model(answer: Answer, url: str) -> str:
    listed = answer.object.get("data")
    names = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if answer.status != 200 or not names:
        raise ConfigError(
            f"{url}/models answers {answer} and lists no model; base_url must end as the server's, mostly with /v1"
        )
    if len(names) > 1:
        shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        raise ConfigError(f"{url} has {len(names)} models; say which with the option 'model': {shown}")
    return str(names[0])


def _refusal(what: str) -> ConfigError:
    return ConfigError(f"reward vlm: {what}")


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise _refusal(f"extra_body is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise _refusal(f"extra_body must be a JSON object, not {text!r:.80}")
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise _refusal(f"pattern {pattern!r} is no regular expression: {error}") from error
    if found.groups > 1:
        raise _refusal(f"pattern {pattern!r} must have one group, the number, not {found.groups}")
    return found

"""Questions about images, put to a vision-language model: how probable it finds some first words of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.images import to_pil
from dmdr_benchmarks.loading import load, load_beside

NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS.split())}


class Judge:
    """A model of transformers that answers questions about images, in its own chat format.

    Of its answer, only the first token is looked at. A wording counts by its own first token. Where that is a part of
    the word, other words that begin so count, too: "10" counts as "1" with a tokenizer that splits numbers into digits.
    """

    def __init__(self, checkpoint: str, chunk_size: int, device: torch.device, dtype: torch.dtype) -> None:
        """Load it.

        Args:
            checkpoint: A folder or hub id that `AutoModelForImageTextToText` and `AutoProcessor` can load.
            chunk_size: Questions at a time.
            device, dtype: Where it runs, and in what precision.

        Raises:
            ConfigError: If it cannot be loaded, or has no chat template.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

        self._processor = load_beside(AutoProcessor, checkpoint, "judge")
        if not getattr(self._processor, "chat_template", None):
            raise ConfigError(f"judge {checkpoint} has no chat template; give a model that was trained to chat")
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"  # the last token of each question is where its answer begins
        self._model = load(AutoModelForImageTextToText, checkpoint, "judge", device, dtype)
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        pad = self._tokenizer.pad_token_id
        self._model.generation_config = GenerationConfig(  # not the model's own, which samples
            max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=pad
        )
        self._chunk_size, self._device, self._dtype = chunk_size, device, dtype

    @torch.no_grad()
    def first_token_probabilities(
        self,
        images: Tensor,
        asked: Sequence[tuple[int, str]],
        choices: Sequence[Sequence[Sequence[str]]],
    ) -> Tensor:
        """How probable each choice is as the beginning of the answer.

        Args:
            images: [B, 3, H, W] in [0, 1].
            asked: Q pairs of an index of an image and a question about it.
            choices: Of each question, C answers, each by its wordings.

        Returns: [Q, C] float64 on the CPU, in [0, 1]. A token of several wordings of an answer counts once.
        """
        pictures = to_pil(images)
        found = []
        for start in range(0, len(asked), self._chunk_size):
            part = asked[start : start + self._chunk_size]
            logits = self._first_logits([(pictures[index], question) for index, question in part])
            chances = logits.float().softmax(-1).double().cpu()
            for row, answers in zip(chances, choices[start : start + self._chunk_size], strict=True):
                found.append(torch.stack([row[self._first_tokens(wordings)].sum() for wordings in answers]))
        return torch.stack(found)

    def _first_logits(self, asked: Sequence[tuple[Any, str]]) -> Tensor:
        """Of pairs of a picture and a question, [Q, vocabulary]."""
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in asked
        ]
        inputs = self._processor.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._device, self._dtype)  # its floating tensors alone get the dtype
        logits: Tensor = self._model.generate(**inputs).logits[0]
        return logits

    def _first_tokens(self, wordings: Sequence[str]) -> list[int]:
        first = [self._tokenizer.encode(wording, add_special_tokens=False)[:1] for wording in wordings]
        return sorted({token for tokens in first for token in tokens})


def wordings(answer: str) -> list[str]:
    """How a one-word answer may begin: in lower case and capitalised, and a number up to ten as a digit.

    Each also after a space, as the published scorer has it.
    """
    word = answer.strip().lower()
    forms = [word, word.capitalize()] + ([DIGITS[word]] if word in DIGITS else [])
    return forms + [f" {form}" for form in forms]


@dataclass
class AsksJudge:
    """What benchmarks and rewards that put questions to a vision-language model share.

    Attributes:
        judge: A folder or hub id of a model that transformers' `AutoModelForImageTextToText` loads, with its processor.
        chunk_size: Questions that the judge is asked at a time.
    """

    judge: str = "Qwen/Qwen3-VL-8B-Instruct"
    chunk_size: int = 8

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1, not {self.chunk_size}")

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the judge.

        Raises:
            ConfigError: If it cannot be loaded.
        """
        self._judge = Judge(self.judge, self.chunk_size, device, dtype)

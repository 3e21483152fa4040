"""A reward that is no network and has no gradient: images that compress well.

dmdr-train --rl grpo --reward examples/digits/png_size.py:score --per_device_train_batch_size 64 --num_generations 8
"""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor


def score(images: Tensor, prompts: Sequence[str], **columns: Any) -> list[float]:
    """Minus the bytes of each image as PNG; `images` [B, 3, H, W] in [0, 1]."""
    pixels = (255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        sizes.append(-float(file.tell()))
    return sizes

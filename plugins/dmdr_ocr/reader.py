"""What reads text in images: rapidocr, whose wheel holds its weights."""

import logging
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import Tensor

from dmdr.errors import ConfigError, one_line
from dmdr.images import to_pil

logger = logging.getLogger("dmdr")


def engine() -> str:
    """Name and version of what reads.

    Raises:
        ConfigError: If it is not installed.
    """
    return _imported()[0]


def _imported() -> tuple[str, Any]:
    """Imported when needed: OpenCV and onnxruntime take most of a second."""
    try:
        import onnxruntime
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise ConfigError(f"needs the package '{error.name}': pip install 'dmdr[ocr]'") from error
    return f"rapidocr {version('rapidocr')} with onnxruntime {onnxruntime.__version__}", RapidOCR


class Reader:
    """Reads text in images, on the CPU and without a network: 0.4 s for 512 x 512 on one core.

    The networks are the ones in the wheel of rapidocr: PP-OCRv6 small in 3.10. As in Flow-GRPO, a line counts however
    unsure the engine is, and none is turned by 180 degrees.
    """

    def __init__(self, threads: int = 1) -> None:
        """Load the networks.

        Args:
            threads: Of this process that read an image; OpenCV's number of threads is set to it, too.

        Raises:
            ConfigError: If rapidocr or onnxruntime is not installed, or the networks cannot be loaded.
        """
        _, engine_class = _imported()
        import cv2

        cv2.setNumThreads(threads)  # otherwise one for each core, in every process
        options = {
            "Global.use_cls": False,
            "Global.text_score": 0.0,
            "Global.log_level": "critical",  # it would tell of each image without text
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        blank = np.full((48, 96, 3), 255, np.uint8)
        try:
            self._engine = engine_class(params=options)
            # It loads its networks late, inside `read`, where failing is no error: so both see an image now.
            self._engine(blank, use_det=False, use_rec=True)
            self._engine(blank, use_det=True, use_rec=True)  # which stays so
        except Exception as error:  # of rapidocr, onnxruntime, OpenCV and the network
            raise ConfigError(f"rapidocr cannot load its networks: {one_line(error)}") from error

    def read(self, images: Tensor) -> list[str]:
        """The text in each image.

        Args:
            images: [B, 3, H, W], any float dtype, in [0, 1]; rounded to 8 bits as `dmdr.images.to_pil` does.

        Returns:
            B texts: the lines from top to bottom and from left to right, with a space between two. Empty where there is
            no text, or where the engine fails, of which the log tells.
        """
        # BGR, as the engine expects an array; contiguous, as OpenCV does.
        return [self._read(np.ascontiguousarray(np.asarray(image)[..., ::-1])) for image in to_pil(images)]

    def _read(self, pixels: np.ndarray) -> str:
        try:
            return " ".join(self._engine(pixels).txts or ())
        except Exception as error:  # whatever odd pixels lead to
            logger.warning("the text of an image cannot be read, which counts as no text: %s", one_line(error))
            return ""

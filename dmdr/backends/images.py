"""The last step of every decoder: network output to images in [0, 1]."""

from torch import Tensor


def to_unit_range(decoded: Tensor) -> Tensor:
    """VAE output [B, 3, H, W] in [-1, 1] -> float32 images in [0, 1]; the clamp passes gradients straight through.

    torch's own clamp has no gradient at and beyond its bounds, which would silence every saturated pixel.
    """
    image = decoded.float() / 2 + 0.5
    return image + (image.clamp(0, 1) - image).detach()

"""Matchings with a discriminator: DMD2, and LADD."""

from dmdr_gan.dmd2 import DMD2
from dmdr_gan.ladd import LADD

__all__ = ["DMD2", "LADD"]

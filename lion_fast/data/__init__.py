"""Images for training and evaluation: folders, lists, built-in sets, splits, draws, transforms."""

from .draws import draw_fraction, draw_long_tail, draw_per_class, draw_total, long_tail_counts
from .images import ArrayImages, FileImages, ImageSet, read_image, to_rgb
from .loading import Splits, load_data, load_images
from .offline import OFFLINE
from .transforms import transforms

__all__ = [
    "OFFLINE",
    "ArrayImages",
    "FileImages",
    "ImageSet",
    "Splits",
    "draw_fraction",
    "draw_long_tail",
    "draw_per_class",
    "draw_total",
    "load_data",
    "load_images",
    "long_tail_counts",
    "read_image",
    "to_rgb",
    "transforms",
]

"""Images for training and evaluation: folders, lists, built-in sets, splits, draws, transforms."""

from lion_fast.data.draws import draw_fraction, draw_long_tail, draw_per_class, draw_total, long_tail_counts
from lion_fast.data.images import ArrayImages, FileImages, ImageSet, read_image, to_rgb
from lion_fast.data.offline import OFFLINE
from lion_fast.data.splits import Splits, load_data, load_images
from lion_fast.data.transforms import transforms

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

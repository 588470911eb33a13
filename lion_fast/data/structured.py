"""Generated tasks about place, number and connection: exact labels, the same pixels on every machine."""

from pathlib import Path

import numpy as np

from lion_fast.data.images import ArrayImages, ImageSet
from lion_fast.data.sources import Raw

IMAGES = 2000
SIDE = 64
# Sprites stand in cells.
CELLS = 4
CELL = SIDE // CELLS
SHAPES = ("cross", "disc", "square", "ring", "diamond")
MOST = 8
# Lines run over the nodes of a lattice. WIDTH pixels wide, two of them are STEP - WIDTH pixels apart.
NODES = 12
STEP = 5
WIDTH = 2
LINES = 3
LENGTH = 16  # nodes of a line
APART = 3  # marked ends are at least so many nodes apart, along the longer of the two axes
SCENES = 60_000


class _Stream(np.random.RandomState):
    """Random numbers that never change with numpy's version, as those of its newer generators may."""

    def whole(self, low: int, high: int, *shape: int) -> np.ndarray:
        """int32 in low..high - 1."""
        return self.randint(low, high, shape, dtype=np.int32)


def _raw(task: str, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Raw:
    about = {"kind": f"generated pictures: {task}", "license": "CC0-1.0"}
    return Raw({"all": ImageSet(ArrayImages(images), labels, classes)}, classes, about)


def _colours(stream: _Stream, things: int) -> tuple[np.ndarray, np.ndarray]:
    """A colour for each background, and for the things on it, which are far from it in every channel."""
    back = stream.whole(0, 256, IMAGES, 1, 3)
    return back, (back + stream.whole(64, 193, IMAGES, things, 3)) % 256


def _sprites(stream: _Stream, there: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Pictures of at most one sprite a cell, somewhere in it. there: bool, shape: int, (IMAGES, cells)."""
    cells = CELLS * CELLS
    back, colours = _colours(stream, cells)
    radius = stream.whole(3, 7, IMAGES, cells)[..., None]
    middle = radius + stream.whole(0, 1 << 16, IMAGES, cells, 2) % (CELL - 2 * radius)
    at = np.arange(CELL, dtype=np.int32)
    y = abs(at - middle[..., :1])[..., :, None]
    x = abs(at - middle[..., 1:])[..., None, :]
    radius, round_ = radius[..., None], x * x + y * y
    masks = [
        (np.maximum(x, y) <= radius) & (np.minimum(x, y) <= radius // 3),
        round_ <= radius * radius,
        np.maximum(x, y) < radius,
        (round_ <= radius * radius) & (3 * round_ > radius * radius),
        x + y <= radius,
    ]
    drawn = np.select([shape[..., None, None] == k for k in range(len(SHAPES))], masks, False)
    drawn &= there[..., None, None]
    pixels = np.where(drawn[..., None], colours[:, :, None, None], back[:, :, None, None])
    pixels = pixels.reshape(IMAGES, CELLS, CELLS, CELL, CELL, 3).swapaxes(2, 3)
    noise = stream.whole(-8, 9, IMAGES, SIDE, SIDE, 1)
    return np.clip(pixels.reshape(IMAGES, SIDE, SIDE, 3) + noise, 0, 255).astype(np.uint8)


def position(cache: Path) -> Raw:
    """2,000 pictures, 64 x 64 RGB: in which of 16 cells the one cross stands, among 3 to 8 other sprites."""
    stream = _Stream(1)
    cells = CELLS * CELLS
    labels = np.arange(IMAGES) % cells
    cross = np.arange(cells) == labels[:, None]
    # the cross is among the first of a random order, whichever its cell
    order = np.where(cross, -1, stream.whole(0, 1 << 30, IMAGES, cells)).argsort(1, kind="stable")
    there = order.argsort(1, kind="stable") <= stream.whole(3, 9, IMAGES, 1)
    shape = np.where(cross, 0, stream.whole(1, len(SHAPES), IMAGES, cells))
    classes = [f"row {k // CELLS + 1}, column {k % CELLS + 1}" for k in range(cells)]
    return _raw("the place of the cross", _sprites(stream, there, shape), labels, classes)


def count(cache: Path) -> Raw:
    """2,000 pictures, 64 x 64 RGB: how many sprites there are, 1 to 8, of any shape, colour and size."""
    stream = _Stream(2)
    cells = CELLS * CELLS
    labels = np.arange(IMAGES) % MOST
    order = stream.whole(0, 1 << 30, IMAGES, cells).argsort(1, kind="stable")
    there = order.argsort(1, kind="stable") <= labels[:, None]
    shape = stream.whole(0, len(SHAPES), IMAGES, cells)
    classes = [str(k + 1) for k in range(MOST)]
    return _raw("the number of sprites", _sprites(stream, there, shape), labels, classes)


def _walks(stream: _Stream) -> np.ndarray:
    """Scenes of lines that neither cross nor touch: nodes (y, x), int32 (scenes, LINES, LENGTH, 2)."""
    # a free node is True; the frame around the lattice is not free
    free = np.zeros((SCENES, NODES + 2, NODES + 2), bool)
    free[:, 1:-1, 1:-1] = True
    scene, alive = np.arange(SCENES), np.ones(SCENES, bool)
    moves = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)], np.int32)
    walks = np.empty((SCENES, LINES, LENGTH, 2), np.int32)
    for line in range(LINES):
        here, last = stream.whole(1, NODES + 1, SCENES, 2), np.full(SCENES, -1)
        alive &= free[scene, here[:, 0], here[:, 1]]
        for k in range(LENGTH):
            if k:
                there = here[:, None] + moves
                open_ = free[scene[:, None], there[..., 0], there[..., 1]]
                # straight on more often than not
                score = stream.whole(0, 256, SCENES, 4) + 128 * (last[:, None] == np.arange(4))
                last = np.where(open_, score, -1).argmax(1)
                alive &= open_.any(1)
                here = np.where(alive[:, None], there[scene, last], here)
            free[scene, here[:, 0], here[:, 1]] = False
            walks[:, line, k] = here
    return walks[alive] - 1


def connected(cache: Path) -> Raw:
    """2,000 pictures, 64 x 64 RGB: whether one line joins the two marked ends of three lines of equal length.

    Which scenes there are does not depend on the label: in all of them the ends that would be marked for
    either label are as far apart. In the manner of "pathfinder" (Linsley et al., NeurIPS 2018).
    """
    stream = _Stream(3)
    labels = np.arange(IMAGES) % 2
    walks = _walks(stream)
    far, other = (abs(walks[:, 0, 0] - end).max(1) for end in (walks[:, 0, -1], walks[:, 1, 0]))
    walks = walks[(far == other) & (far >= APART)][:IMAGES]
    on = np.zeros((IMAGES, SIDE, SIDE), np.int8)
    image = np.arange(IMAGES)[:, None]
    corner = walks * STEP + (SIDE - (NODES - 1) * STEP - WIDTH) // 2
    for k in range(STEP + 1):
        # from each node k pixels towards the next
        steps = corner[:, :, :-1] + k * np.sign(np.diff(walks, axis=2))
        y, x = steps.reshape(IMAGES, -1, 2).transpose(2, 0, 1)
        for dy in range(WIDTH):
            for dx in range(WIDTH):
                on[image, y + dy, x + dx] = 1
    ends = np.stack([corner[:, 0, 0], np.where(labels[:, None], corner[:, 0, -1], corner[:, 1, 0])], 1)
    for dy in range(-1, WIDTH + 1):
        for dx in range(-1, WIDTH + 1):
            on[image, ends[..., 0] + dy, ends[..., 1] + dx] = 2
    # background, lines and marks: three colours that are equally far from each other
    back, apart = stream.whole(0, 256, IMAGES, 1, 3), stream.whole(70, 101, IMAGES, 1, 3)
    colours = (back + apart * np.arange(3, dtype=np.int32)[:, None]) % 256
    images = colours[image[..., None], on].astype(np.uint8)
    return _raw("whether a line joins the marks", images, labels, ["apart", "joined"])


STRUCTURED = {"shapes-position": position, "shapes-count": count, "shapes-connected": connected}

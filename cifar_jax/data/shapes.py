"""``shapes``: ten classes of 32x32 RGB images drawn with NumPy, for training without a network.

Position, size, tilt, colours and clutter vary from image to image, so that no single pixel gives
the class away: a linear model learns little, an MLP more, and a CNN nearly everything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZE = 32
N_TRAIN, N_TEST = 12_000, 2_000

Floats = NDArray[np.floating]


# Each figure is an implicit function of the coordinates x (right) and y (down), both [N, H, W] and
# scaled so that the figure fills about [-1, 1]: negative inside, and approximately the signed
# distance near the edge.
def _box(x: Floats, y: Floats, half_width: float, half_height: float) -> Floats:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 0.9


def _crescent(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.5, y))


def _cross(x: Floats, y: Floats) -> Floats:
    return np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _diamond(x: Floats, y: Floats) -> Floats:
    return (np.abs(x) * 1.35 + np.abs(y) - 1.0) / 1.7


def _frame(x: Floats, y: Floats) -> Floats:
    return np.abs(_box(x, y, 0.65, 0.65)) - 0.2


def _heart(x: Floats, y: Floats) -> Floats:
    lobes = np.hypot(np.abs(x) - 0.42, y + 0.3) - 0.5
    point = np.maximum((np.abs(x) * 1.15 + y - 0.95) / 1.5, -y - 0.15)
    return np.minimum(lobes, point)


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - 0.7) - 0.22


def _square(x: Floats, y: Floats) -> Floats:
    return _box(x, y, 0.8, 0.8)


def _star(x: Floats, y: Floats) -> Floats:
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    return radius - (0.66 + 0.33 * np.cos(5 * angle))


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(y - 0.6, (np.abs(x) * 1.75 - y - 0.95) / 2)


_FIGURES = {
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "diamond": _diamond,
    "frame": _frame,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
CLASS_NAMES = tuple(_FIGURES)


def draw(n: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Draw ``n`` images, cycling through the classes.

    Returns:
        Images uint8 ``[N, H, W, C]`` and labels int32 ``[N]``, a function of ``(n, seed)`` alone.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % len(CLASS_NAMES)
    # In chunks that fit a processor's cache: three times as fast as all at once.
    pieces = np.split(labels, range(100, n, 100))
    return np.concatenate([_draw_figures(rng, piece) for piece in pieces]), labels


def _draw_figures(rng: np.random.Generator, labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Floats:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    # The image's points in the figure's own coordinates: moved, tilted, scaled.
    axis = np.arange(SIZE, dtype=np.float32)
    radius = uniform(5, 11, 1, 1)
    x = axis[None, None, :] - uniform(10, SIZE - 11, 1, 1)
    y = axis[None, :, None] - uniform(10, SIZE - 11, 1, 1)
    tilt = uniform(-0.4, 0.4, 1, 1)
    across = (np.cos(tilt) * x + np.sin(tilt) * y) / radius  # [N, H, W]
    down = (np.cos(tilt) * y - np.sin(tilt) * x) / radius

    distance = np.empty((n, SIZE, SIZE), np.float32)
    for label, figure in enumerate(_FIGURES.values()):
        of_class = labels == label
        distance[of_class] = figure(across[of_class], down[of_class])
    # An edge one pixel wide, as a camera would see it.
    coverage = np.clip(0.5 - distance * radius, 0, 1)[:, None]  # [N, 1, H, W]

    # Channels first while drawing: NumPy is slow where the last axis is only three long.
    image = _background(rng, n)  # [N, C, H, W]
    image += coverage * (_figure_colour(rng, image)[:, :, None, None] - image)
    image += 0.04 * rng.standard_normal(image.shape, dtype=np.float32)
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(pixels, 1, -1))  # [N, H, W, C]


def _background(rng: np.random.Generator, n: int) -> Floats:
    """A colour gradient with clutter, ``[N, C, H, W]`` in 0..1."""
    ramp = np.linspace(0, 0.4, SIZE, dtype=np.float32)
    corner, right, down = rng.uniform(0.1, 0.9, (3, n, 3, 1, 1)).astype(np.float32)
    image = corner + (right - corner) * ramp[None, :] + (down - corner) * ramp[:, None]
    grid = np.arange(SIZE)
    for _ in range(4):
        # A faint rectangle somewhere: a bar or a spot, perhaps partly outside.
        first = rng.integers(-6, SIZE, (2, n, 1))
        last = first + rng.integers(2, 12, (2, n, 1))
        rows, columns = (grid >= first) & (grid < last)  # each [N, SIZE]
        patch = (rows[:, :, None] & columns[:, None, :])[:, None]  # [N, 1, H, W]
        image += patch * rng.uniform(-0.22, 0.22, (n, 3, 1, 1)).astype(np.float32)
    return np.clip(image, 0, 1)


def _figure_colour(rng: np.random.Generator, background: Floats) -> Floats:
    """A colour for each image that contrasts with its background, ``[N, C]`` in 0..1."""
    mean = background.mean(axis=(2, 3))
    colour = rng.uniform(0, 1, mean.shape).astype(np.float32)
    towards = np.where(mean > 0.5, -1, 1)
    too_near = np.abs(colour - mean) < 0.3
    return np.clip(np.where(too_near, mean + 0.45 * towards, colour), 0, 1).astype(np.float32)

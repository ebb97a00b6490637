"""The choices of a run.

From https://github.com/KellerJordan/cifar10-airbench, ``airbench94_muon.py``.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run. The loss is a sum over the batch, so learning rates are for its sum of gradients.

    Attributes:
        widths: channels of the three stages.
        epochs: how many; in each, the images that do not fill a batch are left out.
        whitening_epochs: the whitening's bias is trained in the first ones, and then fixed.
        kernel_rate, kernel_momentum: Muon's, for the 3x3 kernels.
        bias_rate, head_rate, momentum, decay: those of Nesterov SGD, for all else. Its weight decay
            is ``decay / rate``, so that a larger rate does not decay more. All rates fall linearly
            to 0.
        deep: as in :class:`cifar_jax.networks.airbench.Airbench`.
        crop: the most pixels by which an image is shifted.
        cutout: side in pixels of a square that is blanked in each image; 0: no square.
        dtype: of activations.
        fused: train with the kernels of kernels.py, for a GPU.
    """

    widths: tuple[int, ...] = (64, 256, 256)
    deep: bool = False
    epochs: int = 8
    batch_size: int = 2000
    whitening_epochs: int = 3
    kernel_rate: float = 0.24
    kernel_momentum: float = 0.6
    bias_rate: float = 0.053
    head_rate: float = 0.67
    momentum: float = 0.85
    decay: float = 0.004
    label_smoothing: float = 0.2
    crop: int = 2
    cutout: int = 0
    dtype: str = "float16"
    fused: bool = False


# Named by the accuracy, in percent on the original images, of the author's recipe with these
# widths, layers, epochs and augmentation. For 95 and 96 the author's differs otherwise (SGD with
# a warm-up on batches of 1,024, a lookahead; for 96 also slower averages of batch norm), and ours
# has not been run on a GPU yet.
RECIPES = {
    "94": Recipe(),
    "95": Recipe(widths=(128, 384, 384), epochs=15),
    "96": Recipe(widths=(128, 384, 512), deep=True, epochs=37, crop=4, cutout=12),
}

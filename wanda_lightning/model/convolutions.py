"""A convolution as a linear: the patches it slides over are the rows of a matrix of inputs.

Shapes: N images, C channels, H height, W width, P positions of the kernel, I = C * kernel height * kernel width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def is_conv2d(module: nn.Module) -> bool:
    """Whether a module is a Conv2d whose weight, flattened, is one matrix: not split into groups, densely stored."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.weight.is_contiguous()


def convolution_patches(conv: nn.Conv2d, x_NCHW: Tensor) -> Tensor:
    """Return what the kernel sees at each of its positions.

    Args:
        conv: The convolution.
        x_NCHW: Its input, shape (N, C, H, W) or (C, H, W).

    Returns:
        The patches, shape (N, P, I): ``patches @ weight.flatten(1).T`` is what the convolution gives without its bias.
    """
    x_NCHW = x_NCHW if x_NCHW.dim() == 4 else x_NCHW[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded_NCHW = F.pad(x_NCHW, conv._reversed_padding_repeated_twice, mode)  # of "same" too, which unfold cannot
    return F.unfold(padded_NCHW, conv.kernel_size, conv.dilation, stride=conv.stride).transpose(1, 2)

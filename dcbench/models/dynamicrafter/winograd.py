"""3x3 convolution of wide, small frames on a processor with 2.25 times fewer multiplications.

Winograd's F(2x2, 3x3) (Lavin and Gray 2016): tiles of 4x4 inputs and the kernels are transformed by additions and
multiplied as 16 matrix products, whose sums are transformed back to 2x2 outputs. The same function, otherwise rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KERNEL = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])
_TILES = 128  # at once: enough rows for the matrix products, few enough for the cache


def transform_kernel(weight: Tensor) -> Tensor:
    """[o, i, 3, 3] -> [16, i, o]."""
    return torch.einsum("xa,oiab,yb->xyio", _KERNEL, weight, _KERNEL).flatten(0, 1).contiguous()


def convolve(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """[n, i, h, w] with even sides, zero-padded -> [n, o, h, w], both in channels-last memory."""
    n, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    rows = [padded[:, i : i + height : 2] for i in range(4)]
    tiles = x.new_empty(4, 4, n, height // 2, width // 2, channels)
    for i, row in enumerate((rows[0] - rows[2], rows[1] + rows[2], rows[2] - rows[1], rows[1] - rows[3])):
        a, b, c, d = (row[:, :, j : j + width : 2] for j in range(4))
        torch.sub(a, c, out=tiles[i, 0])
        torch.add(b, c, out=tiles[i, 1])
        torch.sub(c, b, out=tiles[i, 2])
        torch.sub(b, d, out=tiles[i, 3])
    m = torch.bmm(tiles.view(16, -1, channels), kernel).view(4, 4, n, height // 2, width // 2, -1)
    out = x.new_empty(n, height // 2, 2, width // 2, 2, m.shape[-1])
    for i, (a, b, c, d) in enumerate((m[0] + m[1] + m[2], m[1] - m[2] - m[3])):
        torch.add(a + b, c, out=out[:, :, i, :, 0])
        torch.sub(b - c, d, out=out[:, :, i, :, 1])
    return out.view(n, height, width, -1).add_(bias).permute(0, 3, 1, 2)


class FrameConv(nn.Conv2d):
    """A 3x3 convolution that keeps the size; Winograd's on a processor, without gradients, where that is faster."""

    narrowest = 256  # channels; measured: below it the transforms cost more than they save

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self._transformed: tuple[int, int, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self._other_way(input):
            return super().forward(input)
        mark = self.weight.data_ptr(), self.weight._version  # changes when the weights do
        if self._transformed is None or self._transformed[:2] != mark:
            self._transformed = (*mark, transform_kernel(self.weight.detach()))
        assert self.bias is not None
        frames = max(1, 4 * _TILES // (input.shape[2] * input.shape[3]))
        kernel, bias = self._transformed[2], self.bias
        parts = [convolve(part, kernel, bias) for part in input.split(frames)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _other_way(self, x: Tensor) -> bool:
        return (
            min(self.in_channels, self.out_channels) >= self.narrowest
            and x.shape[2] % 2 == 0
            and x.shape[3] % 2 == 0
            and x.dtype == torch.float32 == self.weight.dtype
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not self.weight.is_inference()
        )

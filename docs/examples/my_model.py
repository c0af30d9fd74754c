"""A model of your own, as short as it gets: dcbench run --model docs/examples/my_model.py:MyModel --dataset shapes"""

import torch

from dcbench.clips import to_float, to_uint8
from dcbench.seeding import generator


class MyModel:
    conditions_on = frozenset({"image"})  # of: image, prompt, fps, frame_stride, end_image

    def __init__(self, card, runtime):
        self.card, self.device = card, runtime.device  # load your weights here, onto runtime.device

    def generate(self, requests):
        return [self.animate(request) for request in requests]

    def animate(self, request):
        """uint8 [3 h w] -> uint8 [num_frames 3 h w]: the picture drifts, under noise that is the clip's own."""
        image = to_float(request.image).to(self.device)  # [-1, 1]
        noise = torch.randn(request.num_frames, *image.shape, generator=generator(request.seed)).to(self.device)
        frames = [image.roll(k, dims=-1) + 0.05 * noise[k] for k in range(request.num_frames)]
        return to_uint8(torch.stack(frames)).cpu()

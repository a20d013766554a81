"""The video models that the tests of families run."""

from __future__ import annotations

import torch
from family_case import Case
from tiny_models import model_inputs, tiny_wan

VIDEOS = ((3, 3, 5), (1, 1, 2), (2, 5, 4))


def wan_inputs(frames, height, width, **more):
    return model_inputs(frames=frames, height=2 * height, width=2 * width, **more)


def move_wan(inputs, frame, row, column):
    inputs["hidden_states"][:, :, frame, 2 * row + 1, 2 * column] += 1


VIDEO_CASES = {
    "WanTransformer3DModel": Case(lambda: tiny_wan(layers=2), wan_inputs, move_wan, VIDEOS),
    "WanTransformer3DModel, image to video": Case(
        lambda: tiny_wan(layers=1, in_channels=12, image_dim=8, added_kv_proj_dim=32),
        lambda *grid: wan_inputs(
            *grid,
            channels=12,
            encoder_hidden_states=torch.zeros(1, 512, 32),
            encoder_hidden_states_image=torch.zeros(1, 4, 8),
        ),
        move_wan,
        VIDEOS,
    ),
}

"""The picture models that the tests of families run, UNets among them."""

from __future__ import annotations

import torch
from family_case import Case
from tiny_picture_models import flux_inputs, tiny_flux, tiny_unet, unet_inputs

PICTURES = ((1, 5, 7), (1, 9, 4), (1, 8, 8))


def move_flux(inputs, *place):
    inputs["hidden_states"][:, (inputs["img_ids"] == torch.tensor(place)).all(1)] += 1


def move_unet(inputs, frame, row, column):
    inputs["sample"][:, :, row, column] += 1


IMAGE_CASES = {
    "FluxTransformer2DModel": Case(
        lambda: tiny_flux(layers=2, single_layers=2),
        lambda frames, *grid: flux_inputs(*grid),
        move_flux,
        PICTURES,
    ),
    "FluxTransformer2DModel, Kontext": Case(
        tiny_flux,
        lambda frames, *grid: flux_inputs(*grid, reference=(grid[0] + 1, 3)),
        move_flux,
        PICTURES,
    ),
    "UNet2DConditionModel": Case(
        tiny_unet, lambda frames, *grid: unet_inputs(*grid), move_unet, ((1, 9, 13), (1, 8, 5), (1, 5, 5))
    ),
    "UNet2DConditionModel, two levels": Case(
        lambda: tiny_unet(levels=2), lambda frames, *grid: unet_inputs(*grid), move_unet, ((1, 7, 5),)
    ),
}

"""The tiny world: captions keep to the vocabulary, time is the same at any length, clips can be read back."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from tiny_world import (
    COLOURS,
    HEADINGS,
    MOTIONS,
    PAIRED,
    SHAPES,
    UNKNOWN,
    WORDS,
    Scene,
    describe,
    render,
    sample_scene,
)
from tiny_world_recover import recover


def _scene(batch: int, frames: int, height: int = 64, width: int = 64) -> Scene:
    return sample_scene(batch, frames, height, width, torch.Generator().manual_seed(0))


def test_captions_use_only_known_words() -> None:
    scene, dice = _scene(200, 1), random.Random(0)
    for index in range(len(scene)):
        for motion in (True, False):
            words = describe(scene, index, dice, motion).split()
            assert set(words) <= {*WORDS, UNKNOWN}
            assert describe(scene, index).split()[0] in ("a", "an")


def test_a_longer_clip_begins_with_the_shorter_one() -> None:
    (short, _), (long, _) = render(_scene(4, 5)), render(_scene(4, 17))
    torch.testing.assert_close(long[:, :, :5], short)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (80, 48)])
def test_pixels_and_coverage_are_in_range(height: int, width: int) -> None:
    pixels, coverage = render(_scene(16, 3, height, width))
    assert pixels.shape == (16, 3, 3, height, width)
    assert coverage.shape == (16, 1, 3, height, width)
    assert pixels.amin() >= -1
    assert pixels.amax() <= 1
    assert coverage.amax() == 1
    assert torch.isfinite(pixels).all()


def test_true_clips_are_read_back() -> None:
    scene = _scene(32, 17)
    video, _ = render(scene)
    names, right, total = list(COLOURS), 0, 0
    for index in range(len(scene)):
        seen, kind = recover(video[index]), list(MOTIONS)[scene.motion[index]]
        objects = 2 if kind in PAIRED else 1
        total += 1
        right += seen.colours == {names[scene.colour[index, item]] for item in range(objects)}
        if objects == 1:
            total += 1
            right += seen.shape == SHAPES[scene.shape[index, 0]]
        if kind == "moving":
            total += 1
            right += seen.direction == list(HEADINGS)[scene.heading[index]]
    assert right / total > 0.97


def test_an_empty_clip_shows_nothing() -> None:
    assert recover(torch.zeros(3, 5, 32, 32)).colour is None

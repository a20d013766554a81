"""How close one video is to another, by torchmetrics. Knows tensors only, no files."""

from __future__ import annotations

import torch

from fastdiff_kernels import InvalidInputError, MissingDependencyError

_PIXELS_AT_ONCE = 2**21


def psnr(video: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels of all frames; infinite where both are equal.

    Args:
        video: Frames `[frames, 3, height, width]` in [0, 1].
        truth: What they should be, of the same shape.

    Raises:
        InvalidInputError: If shapes differ or values leave [0, 1].
        MissingDependencyError: If torchmetrics is not installed.
    """
    video, truth = _checked(video, truth)
    return float(_metrics().peak_signal_noise_ratio(video, truth, data_range=1.0))


def ssim(video: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean structural similarity of the frames: 1 where both are equal.

    Args:
        video: Frames `[frames, 3, height, width]` in [0, 1], at least 11 pixels high and wide.
        truth: What they should be, of the same shape.

    Raises:
        InvalidInputError: If shapes differ, values leave [0, 1] or frames are smaller than the window.
        MissingDependencyError: If torchmetrics is not installed.
    """
    video, truth = _checked(video, truth)
    if min(video.shape[-2:]) < 11:
        raise InvalidInputError(
            f"frames are {video.shape[-2]}x{video.shape[-1]} pixels; SSIM compares windows of 11x11, give larger ones."
        )
    # A few frames at a time: its convolutions hold a dozen copies of what they are given.
    score = _metrics().structural_similarity_index_measure
    frames = max(1, _PIXELS_AT_ONCE // (video.shape[-2] * video.shape[-1]))
    parts = zip(video.split(frames), truth.split(frames), strict=True)
    values = [score(a, b, data_range=1.0, reduction="none").reshape(-1) for a, b in parts]
    return float(torch.cat(values).mean())


def _checked(video: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for name, frames in (("video", video), ("truth", truth)):
        if frames.dim() != 4 or frames.shape[1] != 3 or not frames.numel():
            raise InvalidInputError(f"{name} has the shape {list(frames.shape)}; give [frames, 3, height, width].")
        if not frames.is_floating_point():
            raise InvalidInputError(f"{name} is {frames.dtype}; give floating-point pixels in [0, 1].")
        if not bool(torch.isfinite(frames).all()):
            raise InvalidInputError(f"{name} has pixels that are not finite; a run went wrong before this.")
        low, high = float(frames.min()), float(frames.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise InvalidInputError(f"{name} has pixels from {low:.3g} to {high:.3g}; scale them to [0, 1].")
    if video.shape != truth.shape:
        raise InvalidInputError(
            f"video has the shape {list(video.shape)} and truth {list(truth.shape)}; compare videos of one shape."
        )
    return video.detach().float(), truth.detach().float().to(video.device)


def _metrics():
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise MissingDependencyError(
            'PSNR and SSIM need torchmetrics: pip install "fastdiff-attention[demo]".'
        ) from error
    return image

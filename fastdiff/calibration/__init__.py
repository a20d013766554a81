"""`calibrate`: finds the token orders and block masks of PARO by watching a pipeline run.

The package has another name than the function, which would be hidden by a module `fastdiff.calibrate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError
from fastdiff_kernels.axis_order import distinct_axis_orders

from .outcome import check_floor, check_records, choose_masks, choose_orders
from .recorder import Candidates, LayerRecord, Recorder
from .settings import CalibrationSettings

if TYPE_CHECKING:
    from fastdiff.methods import ParoConfig

__all__ = ["CalibrationSettings", "calibrate"]


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    path: str | Path,
    density: float = 0.3,
    groups: int = 4,
    objective: str = "mass",
    mask: str = "global",
    sample: float = 1.0,
    alpha: float = 1.0,
    epsilon: float = 1e-3,
    sigma: float = 0.9,
    seed: int = 0,
    **call: Any,
) -> ParoConfig:
    """Chooses, for every head, one of six token orders and the blocks that are worth computing, and writes them down.

    The pipeline runs dense, once for each prompt, and every attention call is looked at in tiles; no attention map is
    ever held. What is found holds for this model at this size, and for any prompt, seed and number of steps. One or
    two prompts do.

    Reference: Zhao et al., "PAROAttention", arXiv 2506.16054, whose calibration is not public.

    Args:
        pipe: A diffusers pipeline with one transformer or UNet, on its device, not patched.
        prompts: What it shall show meanwhile.
        path: The safetensors file to write; it is there whole or not at all.
        density: Computed share of the scores of all layers and heads, text included. Less is faster, more is safer.
        groups: Groups of denoising steps with masks of their own, all of the same share of the steps. More follows the
            attention more closely and takes more memory; 1 works without a pipeline that tells the step.
        objective: What makes an order good: `"mass"`, the attention kept at this density, or `"paper"`, the paper's
            score: blocks that cannot be skipped, and unevenness inside blocks.
        mask: `"global"`: one threshold for the attention in a block for all heads and layers, so that heads differ in
            density; it keeps most attention. `"row"`: every query block keeps the same share of its attention.
        sample: Share of the query blocks to look at for the orders. Below 1 the order is found faster and in less
            memory, with a sampling error, and the prompts run a second time for the masks.
        alpha: For `"paper"`: weight of the first term; less than 1 where attention will be quantised.
        epsilon: For `"paper"`: an entry below it is small.
        sigma: For `"paper"`: a block of which this share is small can be skipped.
        seed: Of the noise; each prompt gets the next.
        call: Further arguments of the pipeline's call: `num_inference_steps`, `height`, `width`, `num_frames` ...

    Returns:
        The config for `fastdiff.apply`.

    Raises:
        InvalidInputError: If a setting is out of range, the density below the floor of this size, the pipeline
            patched, or the file cannot be written.
        UnsupportedError: If the model's family is not described, or the pipeline has two transformers.
    """
    # The command line's door for results: checked before the long run, written under a temporary name.
    from fastdiff import __version__
    from fastdiff.commands.outputs import staged
    from fastdiff.methods import ParoConfig
    from fastdiff.methods.fingerprint import Fingerprint
    from fastdiff.methods.paro_file import Calibration

    settings = CalibrationSettings(density, groups, objective, mask, sample, alpha, epsilon, sigma)
    prompts = _prompts(prompts)
    path = _path(path)
    model = _model(pipe)
    for name in ("prompt", "generator"):
        if name in call:
            raise InvalidInputError(f"{name} is set by calibrate; use {'prompts' if name == 'prompt' else 'seed'}.")
    call = {"output_type": "latent", **call}

    def watch(candidates: Candidates, share: float, details: bool) -> tuple[Recorder, int | None]:
        recorder = Recorder(
            settings.groups,
            candidates,
            share,
            settings.epsilon if details else None,
            settings.sigma,
            lambda records: check_floor(records, settings.density),
        )
        steps = _run(pipe, model, recorder, prompts, seed, call)
        check_records(recorder.records, settings.groups)
        check_floor(recorder.records, settings.density)
        return recorder, steps

    with staged(path.parent, [path.name]) as folder:
        recorder, steps = watch(_all_orders, settings.sample, settings.objective == "paper")
        orders = {layer: choose_orders(record, settings) for layer, record in recorder.records.items()}
        if any(_sampled(record) for record in recorder.records.values()):
            recorder, steps = watch(lambda layer, *_: orders[layer].order[None], 1.0, False)
            orders = {layer: found._replace(candidate=found.candidate * 0) for layer, found in orders.items()}
        unsure = [found.margin < 2 * found.error for found in orders.values()]
        about = {
            **asdict(settings),
            "steps": steps,
            "prompts": len(prompts),
            "seed": seed,
            "heads_within_sampling_error": int(torch.cat(unsure).sum()),
            "fastdiff": __version__,
        }
        layers = choose_masks(recorder.names, recorder.records, orders, settings)
        Calibration(groups, tuple(layers), Fingerprint.of(model), about).save(folder / path.name)
    return ParoConfig(str(path))


def _all_orders(layer: int, grid: Grid, heads: int) -> torch.Tensor:
    return torch.tensor(distinct_axis_orders(grid))[:, None].expand(-1, heads)


def _sampled(record: LayerRecord) -> bool:
    return record.sums.shape[-2] < record.sums.shape[-1]


def _run(
    pipe: Any, model: torch.nn.Module, recorder: Recorder, prompts: list[str], seed: int, call: dict[str, Any]
) -> int | None:
    """Runs all prompts under the recorder; returns the number of steps."""
    from fastdiff.schedule import DenseSchedule
    from fastdiff_patches.attachment import Attachment
    from fastdiff_patches.steps import StepReader

    attached = Attachment(model, recorder, DenseSchedule(), StepReader([pipe]))
    attached.install(model)
    try:
        for number, prompt in enumerate(prompts):
            # On the CPU, so that a seed means the same noise on every device.
            pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed + number), **call)
    finally:
        attached.remove()
    return attached.steps_seen


def _prompts(prompts: str | Sequence[str]) -> list[str]:
    found = [prompts] if isinstance(prompts, str) else list(prompts)
    if not found or not all(isinstance(prompt, str) and prompt.strip() for prompt in found):
        raise InvalidInputError(f"prompts is {prompts!r}; give one or more texts that say what to show.")
    return found


def _path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidInputError(f"the calibration's path is {path}; it must end in .safetensors.")
    return path


def _model(pipe: Any) -> torch.nn.Module:
    """The one model of a pipeline that is dense."""
    from fastdiff_patches import attachment, locate
    from fastdiff_patches.marker import is_marked

    models = locate.transformers(pipe)
    if not hasattr(pipe, "scheduler"):
        raise InvalidInputError(
            f"{type(pipe).__name__} has no scheduler to tell the step; calibrate the pipeline, not the model."
        )
    if len(models) > 1:
        raise UnsupportedError(
            f"{type(pipe).__name__} has {len(models)} transformers and a calibration is for one; choose another method "
            "for this pipeline."
        )
    (model,) = models.values()
    if attachment.find(model) is not None or is_marked(model):
        raise InvalidInputError(
            f"this {type(model).__name__} is patched; call fastdiff.remove(pipe) before calibrating."
        )
    return model

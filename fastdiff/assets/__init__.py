"""The embedded pipelines by name: where each lies, and how it is run when a user says nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff_kernels import InvalidInputError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generate` and `compare` use where the user leaves an option out; None keeps the pipeline's own value.

    Attributes:
        density: Density that the method's config is solved for; None takes the config's own defaults.
        dense_share: Share of the steps, from the first on, that stay dense under a sparse method.
        fps: Frames per second of the written video.
        method: The method where none is named.
        call: Further arguments of the pipeline's call, by name.
    """

    prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    density: float | None = None
    dense_share: float = 0.0
    fps: int = 16
    method: str = "radial"
    call: dict[str, Any] = field(default_factory=dict)


# A model that is not embedded runs with its pipeline's own sizes.
FOREIGN = GenerationDefaults()

EMBEDDED = {
    "tiny-wan": GenerationDefaults(
        prompt="a red circle moving right over a striped ground",
        height=128,
        width=128,
        num_frames=65,
        steps=6,
        guidance_scale=4.0,
        density=0.4,
        dense_share=1 / 3,
    ),
    "tiny-flux": GenerationDefaults(
        prompt="a red circle over a striped ground",
        height=256,
        width=256,
        steps=12,
        guidance_scale=3.0,
        density=0.5,
        dense_share=0.25,
        method="clear",
        # Every text token is attended densely, so short texts are what makes low densities possible.
        call={"max_sequence_length": 64},
    ),
    "tiny-sd": GenerationDefaults(
        prompt="a red circle over a striped ground",
        height=256,
        width=256,
        steps=16,
        guidance_scale=4.0,
        density=0.3,
        dense_share=0.25,
        method="agent",
    ),
}


def pipeline_path(name: str) -> Path:
    """The folder of an embedded pipeline, as `from_pretrained` takes it.

    Without a `torch_dtype` all its parts load in float32.

    Raises:
        InvalidInputError: If there is no embedded pipeline of this name, or the installation lacks its files.
    """
    if name not in EMBEDDED:
        raise InvalidInputError(f"{name!r} is no embedded pipeline; there are {', '.join(EMBEDDED)}.")
    path = FOLDER / name
    if not (path / "model_index.json").is_file():
        raise InvalidInputError(
            f"the files of {name!r} are missing from this installation ({path}); install fastdiff-attention anew."
        )
    return path

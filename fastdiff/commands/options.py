"""Options that several commands share, and what they ask for once parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastdiff.assets import GenerationDefaults
    from fastdiff_kernels import Grid

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# The keys of fastdiff.methods.METHODS and fastdiff.assets.EMBEDDED, whose packages bring torch.
METHODS = ("radial", "neighborhood", "clear", "paro", "agent", "rules")
MODELS = ("tiny-wan", "tiny-flux", "tiny-sd")

Model = Annotated[
    str, typer.Option(help=f"{', '.join(MODELS)} (embedded), a diffusers folder, or the id of a Hub repository.")
]
Method = Annotated[
    str | None,
    typer.Option(help=f"dense, or a sparse method: {', '.join(METHODS)}. By default the one that suits the model."),
]
Config = Annotated[str | None, typer.Option(help="The method's settings: a JSON file, or JSON text.")]
Density = Annotated[
    float | None,
    typer.Option(help="Instead of --config: solve the settings for this share of computed scores, or the next below."),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Instead of --method, --config and --density: published settings by name, see fastdiff presets."),
]
Prompt = Annotated[str | None, typer.Option(help="What to show.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
NumFrames = Annotated[int | None, typer.Option(help="Frames of a video; not for models that make pictures.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Fewer is faster and coarser.")]
GuidanceScale = Annotated[float | None, typer.Option(help="How strictly the prompt is followed.")]
Seed = Annotated[int | None, typer.Option(help="Of the noise: the same seed gives the same result.")]
DenseSteps = Annotated[
    str | None,
    typer.Option(
        help="Steps that stay dense: the first N, a share such as 0.25, or indices such as 0,1,-1. More is slower and "
        "safer. By default those of the preset, else a share of them for embedded models, none for others and for "
        "agent and rules, which have steps of their own."
    ),
]
DenseLayers = Annotated[
    str | None, typer.Option(help="Layers that stay dense, likewise. By default none, or those of the preset.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps. auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. auto: bfloat16 on cuda, else float32.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, and nothing else there.")]


@dataclass(frozen=True)
class Request:
    """What a user asked of generate or compare; None means the model's own default.

    Attributes:
        method: "dense" or a sparse method, never left open.
        config: The method's config, read from what was given.
        preset: The name of the preset that method, config and dense steps and layers come from.
    """

    model: str
    method: str
    config: Any
    density: float | None
    prompt: str | None
    height: int | None
    width: int | None
    num_frames: int | None
    steps: int | None
    guidance_scale: float | None
    seed: int | None
    dense_steps: int | float | list[int] | None
    dense_layers: int | float | list[int]
    device: str
    dtype: str
    preset: str | None = None

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Request:
        """Reads the local variables of a command, and checks all that needs neither model nor torch.

        Raises:
            InvalidInputError: If a value is out of range, or two options contradict each other.
        """
        values = {name: options.get(name) for name in cls.__dataclass_fields__}
        for name in ("dense_steps", "dense_layers"):
            values[name] = _schedule(name, values[name])
        if values["preset"] is not None:
            values |= _of_preset(values)
        if values["dense_layers"] is None:
            values["dense_layers"] = 0
        if values["method"] is None:
            values["method"] = _method_of(values["config"], defaults_for(values["model"]).method)
        request = cls(**values)
        request._check()
        # Before the model is loaded, which may take minutes.
        return replace(request, config=read_config(request.method, request.config))

    @property
    def solve_for(self) -> float | None:
        """The density to solve for: as asked, else the model's default unless a config was given."""
        if self.density is not None or self.config is not None:
            return self.density
        return defaults_for(self.model).density

    def _check(self) -> None:
        _one_of("--device", self.device, DEVICES)
        _one_of("--dtype", self.dtype, DTYPES)
        for name in ("height", "width", "num_frames", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _invalid(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 100:
            raise _invalid(f"--guidance-scale is {self.guidance_scale}; it must be from 0 to 100.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise _invalid(f"--seed is {self.seed}; it must be from 0 to {2**63 - 1}.")
        if self.prompt is not None and not self.prompt.strip():
            raise _invalid("--prompt is empty; say what to show.")
        check_settings(self.method, self.config, self.density)
        if self.method != "dense" and self.config is None and self.solve_for is None:
            check_defaults(self.method)
        dense = {"--dense-steps": self.dense_steps, "--dense-layers": self.dense_layers}
        for name, value in dense.items():
            if self.method == "dense" and value not in (None, 0):
                raise _invalid(f"{name} goes with a sparse method; --method is dense.")


def defaults_for(model: str) -> GenerationDefaults:
    """What an embedded model, or any other, is run with where a user says nothing."""
    from fastdiff.assets import EMBEDDED, FOREIGN

    return EMBEDDED.get(model, FOREIGN)


def check_settings(method: str, config: str | None, density: float | None) -> None:
    """Whether the options of a method go together.

    Raises:
        InvalidInputError: If they do not.
    """
    from fastdiff.methods import METHODS

    _one_of("--method", method, ("dense", *METHODS))
    if config is not None and density is not None:
        raise _invalid("--config and --density exclude each other; give one of them.")
    if density is not None and not 0 < density <= 1:
        raise _invalid(f"--density is {density}; it must be above 0 and at most 1.")
    if method == "dense" and (config is not None or density is not None):
        raise _invalid("--config and --density go with a sparse method; --method is dense.")
    if method == "rules" and config is None:
        raise _invalid("--method rules takes its rules from --config: a JSON file, or JSON text.")


def read_config(method: str, config: str | None) -> Any:
    """The method's config from JSON text or a file, None if none was given.

    Raises:
        InvalidInputError: If it cannot be read, or is for another method.
    """
    from fastdiff.methods import load_config

    if config is None:
        return None
    loaded = load_config(config, method)
    if loaded.method != method:
        raise _invalid(f"--method is {method} and --config is for {loaded.method}; give the same.")
    return loaded


def settings_for(method: str, config: Any, density: float | None, grid: Grid, text: int = 0) -> Any:
    """The method's config: as read, else solved for a density, else the method's defaults.

    Args:
        text: Text tokens in the same sequence, which count in the density.

    Raises:
        InvalidInputError: If this grid does not allow the density, or the method has no defaults.
    """
    from fastdiff.methods import METHODS, load_config

    if config is not None:
        return config
    if density is None:
        return load_config({}, method)
    return METHODS[method].for_density(density, grid, text_tokens=text)


def _of_preset(values: dict[str, Any]) -> dict[str, Any]:
    """What a preset says, but for what else was given.

    Raises:
        InvalidInputError: If there is none of this name, or it goes with another option.
    """
    from fastdiff.published import named

    others = [f"--{name}" for name in ("method", "config", "density") if values[name] is not None]
    if others:
        raise _invalid(f"--preset and {', '.join(others)} exclude each other; give one of them.")
    preset = named(values["preset"])
    told = {"dense_steps": preset.schedule.first_steps, "dense_layers": preset.schedule.layers}
    return {"config": preset.config} | {name: value for name, value in told.items() if values[name] is None}


def _method_of(config: str | None, default: str) -> str:
    from fastdiff.methods import load_config

    return default if config is None else load_config(config, default).method


def check_defaults(method: str) -> None:
    """Whether a method can do without settings.

    Raises:
        InvalidInputError: If it cannot; it names what has no default.
    """
    from fastdiff.methods import METHODS

    missing = METHODS[method].required()
    if missing:
        raise _invalid(
            f"--method {method} has no default for {', '.join(missing)}; give --density, or say it with --config."
        )


def _invalid(message: str) -> Exception:
    # Its package brings torch, for which `--help` should not wait.
    from fastdiff_kernels.errors import InvalidInputError

    return InvalidInputError(message)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _invalid(f"{option} is {value!r}; allowed are {', '.join(allowed)}.")


def _schedule(name: str, text: str | None) -> int | float | list[int] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if len(words) == 1 and re.fullmatch(r"0?\.\d*[1-9]\d*", words[0]):
        return float(words[0])
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers:
        raise _invalid(
            f"--{name.replace('_', '-')} is {text!r}; give a number (the first N), a share such as 0.25, or "
            "indices such as 0,1,-1."
        )
    return numbers[0] if numbers[0] >= 0 and "," not in text else numbers

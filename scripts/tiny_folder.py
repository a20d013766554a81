"""Writes what training made: rounded weights, notes of the loops, and the pipeline folder with its size limits."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from train_loop import Fit

log = logging.getLogger(__name__)
MAX_FILE_BYTES, SHARD = 14_500_000, "10MB"


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts every parameter; loaders keep some in float32, which is for computing and not for disk.

    Convolutions come back from `channels_last`, in which safetensors writes nothing.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).contiguous()
    return model


def report(fits: dict[str, Fit]) -> None:
    for name, fit in fits.items():
        log.info("%s: %d iterations, %.0f s, %.2f it/s", name, fit.iterations, fit.seconds, fit.per_second)


def note(path: Path, fits: dict[str, Fit]) -> None:
    path.write_text(json.dumps({"fits": {name: asdict(fit) for name, fit in fits.items()}}) + "\n")


def read_notes(paths: list[Path]) -> tuple[dict[str, list], dict[str, dict]]:
    """The loss curves by stage, and everything else that the notes say, by file."""
    notes = {path.stem: json.loads(path.read_text()) for path in paths}
    curves = {key: fit["losses"] for saved in notes.values() for key, fit in saved["fits"].items()}
    record = {
        name: {key: {k: v for k, v in fit.items() if k != "losses"} for key, fit in saved["fits"].items()}
        for name, saved in notes.items()
    }
    return curves, record


def write_pipeline(pipe: DiffusionPipeline, folder: Path, max_bytes: int) -> None:
    """Writes a folder that the oldest and the newest supported libraries load alike.

    Raises:
        SystemExit: the folder or one file is larger than it may be.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder, max_shard_size=SHARD)
    # transformers 5 writes the new name of this class, which version 4 does not have; both know the old one.
    for file in (folder / "model_index.json", *folder.glob("tokenizer*/tokenizer_config.json")):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    # transformers 5 loads in the dtype that the configuration names, diffusers in float32; they must agree.
    for file in folder.glob("text_encoder*/config.json"):
        file.write_text(file.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    for file in folder.glob("text_encoder*/model.safetensors"):
        if "CLIPTextModel" in (file.parent / "config.json").read_text():
            _prefix_names(file)
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    log.info("%s: %d bytes in %d files", folder, sum(sizes.values()), len(sizes))
    if sum(sizes.values()) > max_bytes or max(sizes.values()) > MAX_FILE_BYTES:
        raise SystemExit(f"the folder may hold {max_bytes} bytes and each file {MAX_FILE_BYTES}: {sizes}")


def _prefix_names(file: Path) -> None:
    """transformers 5 leaves out the prefix that version 4 cannot do without; both read it."""
    weights = load_file(file)
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
    save_file(prefixed, file, metadata={"format": "pt"})

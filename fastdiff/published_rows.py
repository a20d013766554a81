"""The rows of `fastdiff.presets()`: what was published for which model, and where."""

from __future__ import annotations

from .methods import AgentConfig, ClearConfig, NeighborhoodConfig, RadialConfig, Rule, RulesConfig
from .methods.neighborhood_presets import NeighborhoodPreset, neighborhood_presets
from .published import Preset
from .schedule import DenseSchedule


def every_preset() -> list[Preset]:
    """All of them; of several for one model, the first is what a method's name takes."""
    return [*_radial(), *_cosmos_schedules(), *_neighborhood(), *_clear(), *_agent()]


def _radial() -> list[Preset]:
    code = "mit-han-lab/radial-attention at 72788d4"
    table = f"arXiv 2506.19852, Table 1, and {code}"
    longer = f"arXiv 2506.19852, Table 2, and {code}"
    lora = "a LoRA of that length, which was not released"
    wan, hunyuan = "Wan2.1-T2V-14B", "HunyuanVideo"
    quarter = DenseSchedule(0.24, 1)

    def radial(name, family, model, config, schedule, grid, steps, source, **more):
        return Preset(f"radial-{name}", "radial", family, model, config, schedule, grid, steps, source, **more)

    after = DenseSchedule(0.04, 2)
    wan22 = RadialConfig(0.8, block_size=64)
    return [
        radial("wan-2.2", "wan", "Wan2.2-T2V-A14B", wan22, DenseSchedule(0.275, 1), "20x48x80", 40, code, experts=2),
        radial("wan-2.1", "wan", wan, RadialConfig(0.2), quarter, "18x48x80", 50, table),
        radial("wan-2.1-long", "wan", wan, RadialConfig(1.0), after, "41x45x80", 50, longer, weights=lora),
        radial(
            "hunyuan-video",
            "hunyuan-video",
            hunyuan,
            RadialConfig(0.95, sink=False),
            DenseSchedule(0.24),
            "30x48x80",
            50,
            table,
        ),
        radial(
            "hunyuan-video-long",
            "hunyuan-video",
            hunyuan,
            RadialConfig(1.0),
            after,
            "128x45x80",
            50,
            longer,
            weights=lora,
        ),
    ]


# The windows of Cosmos-Predict2 by the share that they leave out, in percent; frames are whole.
_COSMOS = {
    98: ((4, 16), (1, 1), (11, 5)),
    95: ((12, 16), (4, 1), (1, 5)),
    92: ((12, 24), (4, 8), (1, 1)),
    77: ((20, 40), (4, 8), (1, 1)),
    55: ((28, 56), (4, 8), (1, 1)),
}


def _cosmos_schedules() -> list[Preset]:
    def rule(layers: str, share: int) -> Rule:
        window, stride, dilation = _COSMOS[share]
        config = NeighborhoodConfig((None, *window), (1, *stride), (1, *dilation), base_grid="24x44x80")
        return Rule(config, layers=layers)

    layers = {
        "2B": {98: "0-1", 95: "2, 5, 10", 92: "3-4, 6-9, 27", 77: "11-22, 24-26", 55: "23"},
        "14B": {98: "0-10", 95: "11-12", 92: "13-22", 77: "23, 25, 29-30, 33, 35", 55: "24, 26, 28, 31-32, 34"},
    }
    facts = {"2B": (28, 16), "14B": (36, 40)}
    return [
        Preset(
            f"neighborhood-cosmos-predict2-{size.lower()}",
            "neighborhood",
            "cosmos",
            f"Cosmos-Predict2-{size}-Video2World",
            RulesConfig([rule(named, share) for share, named in rules.items()]),
            DenseSchedule(),
            "24x44x80",
            None,
            "nvidia-cosmos/cosmos-predict2, NATTEN parameters of the Video2World models",
            weights="checkpoints that were trained further with it",
            facts=(
                ("num_layers", facts[size][0]),
                ("num_attention_heads", facts[size][1]),
                ("extra_pos_embed_type", None),
            ),
        )
        for size, rules in layers.items()
    ]


# Family, model, and the window and stride that the method's name takes.
_PAPER = {
    "cosmos": ("cosmos", "Cosmos-1.0-Diffusion-7B", "cosmos-16x32x48-s1x8x16"),
    "hunyuanvideo": ("hunyuan-video", "HunyuanVideo", "hunyuanvideo-18x24x24-s16x8x8"),
    "flux-4k": ("flux", "FLUX.1-dev", "flux-4k-80x80-s16x16"),
}


def _neighborhood() -> list[Preset]:
    def preset(name: str, found: NeighborhoodPreset) -> Preset:
        family, model, _ = next(row for key, row in _PAPER.items() if name.startswith(f"{key}-"))
        return Preset(
            f"neighborhood-{name}",
            "neighborhood",
            family,
            model,
            NeighborhoodConfig(found.config.window, found.config.stride, base_grid=found.grid),
            DenseSchedule(round(found.dense_steps / found.steps, 3)),
            str(found.grid),
            found.steps,
            "arXiv 2504.16922, end-to-end results",
            weights="URAE, for 4096x4096 pixels" if family == "flux" else None,
        )

    first = [row[-1] for row in _PAPER.values()]
    every = neighborhood_presets()
    order = [*first, *(name for name in every if name not in first)]
    return [preset(name, every[name]) for name in order]


def _clear() -> list[Preset]:
    variants = ((32, None), (16, None), (8, None), (16, 4), (8, 4))
    found = []
    for radius, factor in variants:
        pooled = "" if factor is None else f"-down-{factor}"
        found.append(
            Preset(
                f"clear-flux-{radius}{pooled}",
                "clear",
                "flux",
                "FLUX.1-dev",
                ClearConfig(radius, pool_factor=factor),
                DenseSchedule(),
                "1x64x64",
                None,
                "arXiv 2412.16112 and Huage001/CLEAR at 98e9fed",
                weights=f"clear_local_{radius}{pooled.replace('-', '_')}, see load_clear_weights",
            )
        )
    return found


def _agent() -> list[Preset]:
    source = "arXiv 2312.08874 and LeapLabTHU/Agent-Attention at 207ce3e"
    model, config = "Stable Diffusion 1.5", AgentConfig.agent_sd("64x64")
    return [Preset("agent-sd", "agent", "unet", model, config, DenseSchedule(), "1x64x64", 50, source)]

"""The seed that planners may ask for: one number for each run, drawn from its first latents."""

import pytest
import torch
from fake_planner import FakePlanner, put_on
from tiny_models import tiny_wan_pipeline, video
from tiny_picture_models import picture, tiny_flux_pipeline, tiny_sd_pipeline, tiny_unet, unet_inputs

from fastdiff_patches.needs import seed_of

torch.set_num_threads(1)


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def seeds(planner) -> list[int]:
    found = [extras.inputs["seed"] for extras in planner.extras]
    planner.extras.clear()
    assert all(seed.shape == () and seed.dtype == torch.int64 and seed.device.type == "cpu" for seed in found)
    assert all(seed >= 0 for seed in found)
    return [int(seed) for seed in found]


@pytest.mark.parametrize(
    ("build", "call"),
    [(tiny_wan_pipeline, video), (tiny_flux_pipeline, picture), (tiny_sd_pipeline, picture)],
    ids=["wan", "flux", "sd"],
)
def test_one_for_each_run(build, call):
    pipe = build()
    planner = put_on(pipe, FakePlanner(needs=frozenset({"seed"})))
    found = []
    for seed in (0, 1, 0):
        call(pipe, **({"generator": torch.Generator().manual_seed(seed)} if call is video else {"seed": seed}))
        of_run = seeds(planner)
        assert len(set(of_run)) == 1
        assert len(of_run) >= 6
        found.append(of_run[0])
    assert found[0] == found[2] != found[1]


def test_runs_of_one_step_and_after_dense_steps():
    pipe = tiny_sd_pipeline()
    planner = put_on(pipe, FakePlanner(needs=frozenset({"seed"})))
    once = []
    for seed in (0, 1):
        picture(pipe, seed=seed, num_inference_steps=1)
        once.append(set(seeds(planner)))
    assert len(once[0]) == len(once[1]) == 1
    assert once[0] != once[1]
    put_on(pipe, planner, dense_steps=2)
    picture(pipe, seed=0)
    late = set(seeds(planner))
    put_on(pipe, planner)
    picture(pipe, seed=0)
    assert set(seeds(planner)) == late, "drawn from the first latents, dense or not"


def test_outside_a_run_from_each_forward():
    model = tiny_unet()
    planner = put_on(model, FakePlanner(needs=frozenset({"seed"})))
    found = []
    for seed in (0, 1, 0):
        run(model, unet_inputs(seed=seed))
        found.append(set(seeds(planner)))
    assert found[0] == found[2] != found[1]


def test_going_back_begins_a_run():
    class Scheduler:
        num_inference_steps, timesteps, begin_index, step_index = 3, torch.tensor([3, 2, 1]), None, 0

    class Pipe:
        unet, scheduler = tiny_unet(), Scheduler()

    pipe, found = Pipe(), []
    planner = put_on(pipe, FakePlanner(needs=frozenset({"seed"})))
    for step, seed in ((0, 0), (1, 1), (0, 1)):
        pipe.scheduler.step_index = step
        run(pipe.unet, unet_inputs(seed=seed))
        found.append(set(seeds(planner)))
    assert found[0] == found[1] != found[2]


def test_it_takes_one_sample_of_any_size_and_dtype():
    one = torch.randn(1, 4, 8, 9)
    assert seed_of(one) == seed_of(torch.cat([one, one + 1]))
    assert seed_of(one) != seed_of(one.flip(-1))
    assert seed_of(one.bfloat16()) >= 0
    with torch.inference_mode():
        assert seed_of(one) == seed_of(one.clone())

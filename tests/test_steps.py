"""Step counting under plain pipeline calls: schedulers, guidance, two runs, both experts of Wan 2.2."""

import gc
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from fake_planner import FakePlanner
from tiny_models import call_arguments, model_inputs, tiny_scheduler, tiny_wan_pipeline

from fastdiff.schedule import DenseSchedule
from fastdiff_kernels import InvalidInputError
from fastdiff_patches.attachment import Attachment, find
from fastdiff_patches.steps import StepReader

torch.set_num_threads(1)


def put_on(pipe, steps=0) -> FakePlanner:
    planner = FakePlanner()
    for model in (pipe.transformer, pipe.transformer_2):
        if model is not None:
            Attachment(model, planner, DenseSchedule(steps), StepReader([pipe])).install(model)
    return planner


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 1), (3.0, 2)], ids=["plain", "guided"])
def test_steps_of_a_run_and_of_the_next(scheduler, guidance, calls):
    pipe = tiny_wan_pipeline(scheduler=scheduler)
    planner = put_on(pipe, steps=1)
    for _ in range(2):
        planner.asked.clear()
        pipe(**call_arguments(steps=4, guidance_scale=guidance))
        assert planner.steps_asked() == [step for step in (1, 2, 3) for _ in range(calls)]
        assert {asked["steps"] for asked in planner.asked} == {4}


def test_both_experts_count_together():
    pipe = tiny_wan_pipeline(two_experts=True)
    planner, seen = put_on(pipe, steps=[0, -1]), []
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name)
        model.register_forward_pre_hook(
            lambda *_, name=name, model=model: seen.append((name, [layer.active for layer in find(model).layers]))
        )
    pipe(**call_arguments(steps=6, guidance_scale=1.0))
    assert planner.steps_asked() == [1, 2, 3, 4]
    assert {name for name, _ in seen} == {"transformer", "transformer_2"}
    assert [active for _, active in seen] == [[False] * 2, *[[True] * 2] * 4, [False] * 2]


def test_image_to_video():
    pipe = tiny_wan_pipeline(image_to_video=True)
    planner = put_on(pipe, steps=2)
    pipe(image=torch.rand(1, 3, 48, 80), **call_arguments(steps=3, guidance_scale=1.0))
    assert planner.steps_asked() == [2]


def test_a_swapped_scheduler_is_followed():
    pipe = tiny_wan_pipeline()
    planner = put_on(pipe)
    pipe.scheduler = tiny_scheduler("euler")
    pipe(**call_arguments(steps=2, guidance_scale=1.0))
    assert planner.steps_asked() == [0, 1]


def test_outside_a_run_there_is_no_step():
    pipe = tiny_wan_pipeline()
    planner = put_on(pipe, steps=3)
    with torch.no_grad():
        pipe.transformer(**model_inputs())
        pipe(**call_arguments(steps=3))
        pipe.transformer(**model_inputs())
    assert planner.steps_asked() == [None, None]


def test_an_interrupted_run_does_not_shift_the_next():
    pipe = tiny_wan_pipeline()
    planner = put_on(pipe)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    pipe(**call_arguments(steps=4, guidance_scale=1.0), callback_on_step_end=stop)
    assert planner.steps_asked() == [0, 1]
    planner.asked.clear()
    pipe(**call_arguments(steps=4, guidance_scale=1.0))
    assert planner.steps_asked() == [0, 1, 2, 3]


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def test_a_begin_index_counts_before_the_first_step():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    pipe = Pipe(scheduler)
    assert StepReader([pipe]).read(None) == (4, 10)


@pytest.mark.parametrize("shape", [(), (2,), (2, 5)], ids=str)
def test_schedulers_without_an_index_are_read_by_the_timestep(shape):
    pipe = Pipe(DDIMScheduler())
    reader = StepReader([pipe])
    assert reader.read(torch.tensor(500.0)) == (None, None)
    pipe.scheduler.set_timesteps(5)
    read = [reader.read(timestep.expand(shape))[0] for timestep in pipe.scheduler.timesteps]
    assert read == [0, 1, 2, 3, 4]
    assert reader.read(None) == (None, None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_timesteps_that_are_not_listed_are_training(dtype):
    pipe = Pipe(DDIMScheduler())
    reader = StepReader([pipe])
    pipe.scheduler.set_timesteps(4)
    listed = pipe.scheduler.timesteps.to(dtype)
    assert [reader.read(timestep)[0] for timestep in listed] == [0, 1, 2, 3]
    for timestep in (3, 510, 990):
        assert reader.read(torch.tensor([timestep, timestep], dtype=dtype)) == (None, None)


def test_a_timestep_that_comes_twice_is_counted():
    pipe = Pipe(PNDMScheduler(skip_prk_steps=True))
    reader, sample = StepReader([pipe]), torch.zeros(1, 2)
    pipe.scheduler.set_timesteps(4)
    timesteps = pipe.scheduler.timesteps
    assert len(set(timesteps.tolist())) < len(timesteps) == 5
    read = []
    for timestep in timesteps:
        read.append(reader.read(timestep)[0])
        pipe.scheduler.step(sample, timestep, sample)
    assert read == [0, 1, 2, 3, 4]


def test_second_order_schedulers_count_their_half_steps():
    pipe = Pipe(HeunDiscreteScheduler())
    pipe.scheduler.set_timesteps(3)
    assert StepReader([pipe]).read(None) == (0, 5)


def test_pipelines_are_held_weakly_and_the_scheduler_is_not():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    pipe = Pipe(scheduler)
    reader, gone = StepReader([pipe]), weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    assert reader.pipes() == []
    assert reader.read(None) == (0, 10)


def test_pipelines_that_share_a_model_share_a_scheduler():
    first, second = Pipe(EulerDiscreteScheduler()), Pipe(EulerDiscreteScheduler())
    reader = StepReader([first, second])
    with pytest.raises(InvalidInputError, match="different schedulers"):
        reader.read(None)
    second.scheduler = first.scheduler
    assert reader.read(None) == (None, None)


@pytest.mark.parametrize(
    ("steps", "dense"),
    [
        (0, []),
        (2, [0, 1]),
        ([0, -1], [0, 4]),
        ([3], [3]),
        (range(1, 3), [1, 2]),
        (9, [0, 1, 2, 3, 4]),
        ([7], []),
        (0.4, [0, 1]),
        (0.05, []),
    ],
)
def test_schedule(steps, dense):
    schedule = DenseSchedule(steps)
    assert [step for step in range(5) if schedule.is_dense(step, 5, 0, 2)] == dense
    assert not schedule.is_dense(None, None, 0, 2)
    assert DenseSchedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("named", "dense"),
    [
        ({"last_steps": 2}, [10, 11]),
        ({"last_steps": 0.25}, [9, 10, 11]),
        ({"every": 5}, [0, 5, 10]),
        ({"first_steps": 0.25, "last_steps": 1, "every": 4}, [0, 1, 2, 4, 8, 11]),
        ({"first_steps": [3], "every": 6}, [0, 3, 6]),
        ({"last_steps": 20}, list(range(12))),
    ],
)
def test_the_last_steps_and_every_nth(named, dense):
    schedule = DenseSchedule(**named)
    assert schedule.uses_steps
    assert [step for step in range(12) if schedule.is_dense_step(step, 12)] == dense
    assert DenseSchedule.from_dict(schedule.to_dict()) == schedule


def test_a_share_of_the_layers():
    schedule = DenseSchedule(layers=0.3)
    assert [layer for layer in range(10) if schedule.is_dense(None, None, layer, 10)] == [0, 1, 2]
    assert not schedule.uses_steps
    assert schedule.to_dict() == {"dense_steps": 0, "dense_layers": 0.3}


@pytest.mark.parametrize(
    "named",
    [{"last_steps": [1]}, {"last_steps": -1}, {"last_steps": 1.5}, {"every": 1}, {"every": 0.5}, {"every": [2]}],
    ids=str,
)
def test_bad_ends_and_strides_are_refused(named):
    with pytest.raises(InvalidInputError, match=f"{next(iter(named))} is"):
        DenseSchedule(**named)


@pytest.mark.parametrize("steps", [-1, True, 1.5, 1.0, 0.0, "3", None, [0, 1.0], [True], {0: 1}])
def test_bad_schedules_are_refused(steps):
    with pytest.raises(InvalidInputError, match="dense_steps is"):
        DenseSchedule(steps)
    with pytest.raises(InvalidInputError, match="dense_layers is"):
        DenseSchedule(0, steps)


@pytest.mark.parametrize("layers", [4, [3], [-4]])
def test_layers_that_a_model_lacks_are_refused(layers):
    with pytest.raises(InvalidInputError, match="this model has 3 layers"):
        DenseSchedule(0, layers).check_layers(3)
    with pytest.raises(InvalidInputError, match="this run has 3 steps"):
        DenseSchedule(layers).check_steps(3)


def test_more_last_steps_than_a_run_has_are_refused():
    with pytest.raises(InvalidInputError, match="last_steps is 4; this run has 3 steps"):
        DenseSchedule(last_steps=4).check_steps(3)
    DenseSchedule(0.5, last_steps=0.5).check_steps(3)


def test_unknown_schedule_keys_are_refused():
    with pytest.raises(InvalidInputError, match="no dense_heads"):
        DenseSchedule.from_dict({"dense_heads": 1})
    with pytest.raises(InvalidInputError, match="no 1"):
        DenseSchedule.from_dict({1: 1})
    for data in (None, [1]):
        with pytest.raises(InvalidInputError, match="give a dict of dense_steps"):
            DenseSchedule.from_dict(data)

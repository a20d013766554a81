"""What single video families do that the tests of all families do not see."""

import pytest
import tiny_video_models as tiny
import torch
from family_cases_video import wan_inputs

import fastdiff
from fastdiff_kernels import UnsupportedError

torch.set_num_threads(1)


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def test_skyreels_block_by_block_in_time_is_refused():
    model = tiny.wan_relative("SkyReelsV2Transformer3DModel", num_frame_per_block=2)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32))
    with pytest.raises(UnsupportedError, match=r"num_frame_per_block is 2.*causal_block_size=1"):
        run(model, wan_inputs(4, 3, 5))
    fastdiff.remove(model)
    assert run(model, wan_inputs(4, 3, 5)).shape == (1, 4, 4, 6, 10)

"""Pictures of matrices: zeros are exactly the pruned weights, and the rest is right to the rounding."""

import base64

import numpy as np
import pytest
import torch

from optimum_sparse.report.pictures import COLUMNS, MOST_PICTURES, ROWS, take_picture, take_pictures

from .reports import Weight, two_of_four


def levels_of(picture) -> np.ndarray:
    return np.frombuffer(base64.b64decode(picture.levels), dtype=np.int8).reshape(picture.rows, picture.columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_are_the_weights(dtype):
    weight = two_of_four(200, 300).to(dtype)
    weight[0, 0], weight[1, 0] = 50.0, -1e-6  # an outlier, and what rounds to zero
    picture = take_picture(Weight("fc", "2:4", weight))
    corner, levels = weight[:ROWS, :COLUMNS].float().numpy(), levels_of(picture)
    assert (levels == 0).tolist() == (corner == 0).tolist()
    assert np.sign(levels).tolist() == np.sign(corner).tolist()
    assert levels[0, 0] == 127 and levels[1, 0] == -1
    inside = (abs(corner) < picture.scale) & (abs(levels) > 1)
    assert abs(levels * picture.scale / 127 - corner)[inside].max() <= picture.scale / 127 * 0.501
    assert len(picture.levels) < 11_000


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (1, 400)])
def test_small_and_empty_matrices(shape):
    picture = take_picture(Weight("fc", "0.5", torch.zeros(shape)))
    assert (picture.rows, picture.columns) == (shape[0], min(shape[1], COLUMNS))
    assert not levels_of(picture).any()


def test_one_of_each_kind_from_the_middle():
    weights = [Weight(f"h.{block}.{kind}", "0.5", torch.ones(1, 1)) for block in range(5) for kind in ("up", "down")]
    assert [picture.name for picture in take_pictures(weights)] == ["h.2.up", "h.2.down"]
    many = [Weight(chr(97 + i), "0.5", torch.ones(1, 1)) for i in range(20)]
    assert len(take_pictures(many)) == MOST_PICTURES

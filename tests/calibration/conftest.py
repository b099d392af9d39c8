"""A model for tests of calibration data."""

import pytest

from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def llama():
    return tiny_model()

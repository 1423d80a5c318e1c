"""What tests of pictures share: the demo model in memory."""

import pytest

from gpu_worker import demo_model
from gpu_worker.models import weights
from tests.gpu_worker.conftest import as_cached


@pytest.fixture(scope="package")
def models() -> weights.Models:
    """The committed checkpoint."""
    return weights.load(as_cached(demo_model.CHECKPOINT), None, "cpu")

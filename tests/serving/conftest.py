import pytest

from tests.serving.world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A world whose VM reads every kind of field and a latent history."""
    return make_world(tmp_path_factory.mktemp("world"))

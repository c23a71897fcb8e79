import pytest


@pytest.fixture
def long(request) -> bool:
    """Whether --long asks for hundreds of kills and inputs instead of the few that always run."""
    return request.config.getoption("--long")

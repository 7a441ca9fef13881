"""A photo, and the application in this process for test modules with a fixture `settings`."""

import pytest
from local_service import make_app, make_replicas, wait_until_loaded
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def photo(photos):
    return photos[0].resize((160, 120))


@pytest.fixture(scope="module")
def replicas(settings):
    return make_replicas(settings)


@pytest.fixture(scope="module")
def client(settings, replicas):
    with TestClient(make_app(settings, replicas), "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        wait_until_loaded(client)
        yield client

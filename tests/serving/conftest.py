"""A photo, and the application in this process or in a browser, for test modules with a fixture `settings`."""

import socket
import threading

import pytest
import uvicorn
from local_service import make_app, make_replicas, wait_until_loaded
from page_browser import open_page, start_browser, wait_for
from starlette.testclient import TestClient

from bsq_ray.serving.http.admission import hash_token


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


@pytest.fixture(scope="module")
def start_server():
    """Return a function that starts an ASGI application on loopback, and returns its URL."""
    servers = []

    def start(app):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error"))
        threading.Thread(target=server.run, daemon=True).start()
        servers.append(server)
        wait_for(lambda: server.started)
        return f"http://127.0.0.1:{port}/"

    yield start
    for server in servers:
        server.should_exit = True


@pytest.fixture(scope="module")
def serve(settings, replicas, start_server):
    """Return a function that starts the service, with or without a token, and returns its URL."""

    def start(token=None, **loading_replicas):
        models = settings.models | dict.fromkeys(loading_replicas, settings.models["small"])
        served_settings = settings.model_copy(update={"models": models})
        return start_server(make_app(served_settings, replicas | loading_replicas, token and hash_token(token)))

    return start


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    driver = start_browser(downloads)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def url(serve):
    return serve()


@pytest.fixture
def page(browser, serve, url):
    page = open_page(browser, url)
    page.wait_shown("compress")
    return page

"""The page in a real browser: compressing, comparing, downloading, drawing; by mouse and keyboard, wide and narrow."""

import asyncio
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from local_service import make_app, save_clip_models, save_models
from PIL import Image
from small_videos import make_street_video

from bsq_ray import Codec
from bsq_ray.codec.files import compress_file
from bsq_ray.serving.http.admission import digest
from bsq_ray.serving.service_config import Settings

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
TOKEN = "the-token-of-this-test"

pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver; .ci/run installs them"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return Settings(models=save_models(folder) | {"clips": save_clip_models(folder)["clips"]})


@pytest.fixture(scope="module")
def serve(settings, replicas):
    """Starts the application on loopback, with or without a token; the URL."""
    servers = []

    def start(token=None, **late):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        models = settings.models | dict.fromkeys(late, settings.models["small"])
        served = settings.model_copy(update={"models": models})
        app = make_app(served, replicas | late, token and digest(token))
        server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error"))
        threading.Thread(target=server.run, daemon=True).start()
        servers.append(server)
        wait_for(lambda: server.started)
        return f"http://127.0.0.1:{port}/"

    yield start
    for server in servers:
        server.should_exit = True


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "what was waited for did not happen"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def page_of(browser, url, width=1100, height=900):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(url)
    find = lambda name: browser.find_element("id", name)  # noqa: E731
    return SimpleNamespace(
        find=find,
        text=lambda name: find(name).text,
        wait_shown=lambda name: wait_for(lambda: find(name).is_displayed()),
        run=browser.execute_script,
    )


@pytest.fixture
def page(browser, serve, url):
    page = page_of(browser, url)
    page.wait_shown("compress")
    return page


@pytest.fixture(scope="module")
def url(serve):
    return serve()


@pytest.fixture(scope="module")
def photo(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    photos[0].resize((200, 150)).save(path)
    return path


def test_a_photograph_is_compared_measured_and_downloaded_and_its_file_shown(page, photo, downloads, settings):
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    data = Codec.from_pretrained(settings.models["small"]).compress(Image.open(photo)).data
    facts = page.text("facts")
    assert f"bits\n{8 * len(data):,}" in facts
    assert f"bits per pixel\n{8 * len(data) / (200 * 150):.3f}" in facts
    assert "PSNR" in facts
    assert "LPIPS" in facts
    rows = page.text("rows").splitlines()
    assert len(rows) == 5
    assert rows[1].startswith("JPEG of equal LPIPS")
    assert page.run("return arguments[0].naturalWidth", page.find("shown")) == 200
    page.find("download").click()
    file = downloads / "image.bsq"
    wait_for(file.exists)
    wait_for(lambda: file.read_bytes() == data)
    page.find("file").send_keys(str(file))
    wait_for(lambda: "written with the model small" in page.text("compress-status"))
    assert not page.find("slider").is_displayed()
    assert page.find("shown").is_displayed()


def test_the_slider_moves_by_keyboard_and_says_where_it_is(page, photo):
    from selenium.webdriver.common.keys import Keys

    page.find("file").send_keys(str(photo))
    page.wait_shown("slider")
    slider = page.find("slider")
    for _ in range(10):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("aria-valuetext") == "60 percent original"
    clip = page.run("return getComputedStyle(arguments[0]).clipPath", page.find("original"))
    assert "40%" in clip


def test_a_class_is_drawn_step_by_step_and_can_be_stopped(page):
    from selenium.webdriver.support.ui import Select

    assert [option.text for option in Select(page.find("class")).options] == [
        *(f"class {n}" for n in range(4)), "any class",
    ]  # fmt: skip
    Select(page.find("class")).select_by_visible_text("class 2")
    for name, value in (("steps", "6"), ("seed", "11")):
        page.find(name).clear()
        page.find(name).send_keys(value)
    page.find("start").click()
    wait_for(lambda: page.text("draw-status") == "Drawn in 6 steps with the seed 11.")
    assert page.find("drawn").get_attribute("alt") == "A picture of class 2, 6 of 6 steps"
    assert page.find("progress").get_attribute("value") == "6"
    page.find("steps").clear()
    page.find("steps").send_keys("256")
    page.find("start").click()
    wait_for(lambda: page.find("start").text == "Stop")
    page.find("start").click()
    wait_for(lambda: page.text("draw-status") == "Stopped.")


class NeverLoaded:
    async def facts(self):
        return await asyncio.Event().wait()


def test_what_is_typed_stays_while_another_model_is_loaded(browser, serve):
    from selenium.webdriver.support.ui import Select

    page = page_of(browser, serve(late={"tokenizer": NeverLoaded()}))
    page.wait_shown("generate")
    Select(page.find("class")).select_by_visible_text("class 3")
    page.find("steps").clear()
    page.find("steps").send_keys("7")
    asked = "return performance.getEntriesByType('resource').filter((entry) => entry.name.endsWith('models')).length"
    before = page.run(asked)
    wait_for(lambda: page.run(asked) >= before + 2)
    assert page.find("steps").get_attribute("value") == "7"
    assert Select(page.find("class")).first_selected_option.text == "class 3"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "street.mp4"
    path.write_bytes(make_street_video(30, size=(160, 96)))
    return path


def playing(page, name):
    return page.run("return arguments[0].readyState >= 2 && !arguments[0].paused", page.find(name))


def test_a_video_is_shown_beside_its_reconstruction_and_its_file_alone(page, clip, downloads, settings):
    page.find("file").send_keys(str(clip))
    page.wait_shown("clips")
    wait_for(lambda: "Done with the model clips" in page.text("compress-status"))
    compress_file(settings.models["clips"], str(clip), str(downloads / "expected.bsq"))
    data = (downloads / "expected.bsq").read_bytes()
    assert f"bits\n{8 * len(data):,}" in page.text("facts")
    assert "frames\n30" in page.text("facts")
    for name in ("source", "clip"):
        wait_for(lambda name=name: page.run("return arguments[0].videoWidth", page.find(name)) == 160)
    assert not page.find("picture").is_displayed()
    page.run("arguments[0].play()", page.find("clip"))
    wait_for(lambda: playing(page, "clip") and playing(page, "source"))
    page.run("arguments[0].pause(); arguments[0].currentTime = 0.6", page.find("source"))
    wait_for(lambda: not playing(page, "clip"))
    wait_for(lambda: page.run("return arguments[0].currentTime", page.find("clip")) == pytest.approx(0.6, abs=0.1))
    page.find("download").click()
    file = downloads / "clip.bsq"
    wait_for(lambda: file.exists() and file.read_bytes() == data)
    page.find("file").send_keys(str(file))
    wait_for(lambda: "clip.bsq, written with the model clips" in page.text("compress-status"))
    assert page.find("clip").is_displayed()
    assert not page.find("source").is_displayed()


def test_a_video_that_the_browser_cannot_play_is_compressed_all_the_same(page, tmp_path):
    (tmp_path / "raw.mkv").write_bytes(make_street_video(6, container_format="matroska", codec="ffv1"))
    page.find("file").send_keys(str(tmp_path / "raw.mkv"))
    page.wait_shown("clip")
    wait_for(lambda: not page.find("source").is_displayed())


def test_a_file_that_is_no_picture_is_answered_in_words(page, tmp_path):
    (tmp_path / "note.txt").write_text("not a picture")
    page.find("file").send_keys(str(tmp_path / "note.txt"))
    wait_for(lambda: "the body is not an image or video" in page.text("compress-status"))
    assert not page.find("result").is_displayed()


def test_a_large_photograph_is_shrunk_before_it_is_sent(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(noise).resize((2000, 1600)).save(tmp_path / "large.jpg")
    page.find("file").send_keys(str(tmp_path / "large.jpg"))
    page.wait_shown("result")
    assert page.run("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", page.find("shown")) == [640, 512]
    wait_for(lambda: "Shrunk to 640 × 512 pixels" in page.text("compress-status"))


@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_sticks_out_and_everything_has_a_name(browser, url, photo, width):
    page = page_of(browser, url, width)
    page.wait_shown("compress")
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    assert page.run("return document.documentElement.scrollWidth") <= width
    unnamed = """
        return [...document.querySelectorAll("input, select, button, progress, img, a")].filter((part) =>
          part.offsetParent && !part.labels?.length && !part.ariaLabel && !part.alt && !part.textContent.trim())
          .map((part) => part.outerHTML)"""
    assert page.run(unnamed) == []
    assert page.run("return [...document.querySelectorAll('h1, h2, h3')].map((part) => part.tagName)")[0] == "H1"
    # Every part that can be used is reached by the keyboard.
    assert page.run("return [...document.querySelectorAll('[tabindex]')].every((part) => part.tabIndex >= 0)")


def test_nothing_comes_from_elsewhere_and_the_browser_complains_of_nothing(browser, url, page, photo):
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith((url, "data:", "blob:")) for name in loaded)
    complaints = [entry for entry in browser.get_log("browser") if "status of 415" not in entry["message"]]
    assert complaints == []


def test_the_page_asks_for_the_token(browser, serve, photo):
    page = page_of(browser, serve(TOKEN))
    page.wait_shown("access")
    assert not page.find("compress").is_displayed()
    page.find("token").send_keys("wrong\n")
    time.sleep(0.3)
    page.wait_shown("access")
    page.find("token").clear()
    page.find("token").send_keys(f"{TOKEN}\n")
    page.wait_shown("compress")
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")

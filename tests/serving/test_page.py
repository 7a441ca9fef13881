"""The page in a real browser: compression, comparison, download, generation; by mouse and keyboard, wide and narrow."""

import asyncio
import time

import httpx
import numpy as np
import pytest
from local_service import save_models, save_video_models
from page_browser import needs_browser, open_page, wait_for
from PIL import Image
from small_videos import make_street_video

from bsq_ray import Codec
from bsq_ray.codec.files import compress_file
from bsq_ray.serving.service_config import Settings

TOKEN = "the-token-of-this-test"

pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return Settings(models=save_models(folder) | {"clips": save_video_models(folder)["clips"]})


@pytest.fixture(scope="module")
def photo(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    photos[0].resize((200, 150)).save(path)
    return path


def test_page_compresses_measures_and_downloads_photo(page, photo, downloads, settings):
    """The page compresses, compares, measures and downloads a photo, and displays its .bsq file."""
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    data = Codec.from_pretrained(settings.models["small"]).compress(Image.open(photo)).data
    metrics = page.text("metrics")
    assert f"bits\n{8 * len(data):,}" in metrics
    assert f"bits per pixel\n{8 * len(data) / (200 * 150):.3f}" in metrics
    assert "PSNR" in metrics
    assert "LPIPS" in metrics
    rows = page.text("size-rows").splitlines()
    assert len(rows) == 5
    assert rows[1].startswith("JPEG of equal LPIPS")
    assert page.run("return arguments[0].naturalWidth", page.find("decoded")) == 200
    page.find("download").click()
    file = downloads / "image.bsq"
    wait_for(file.exists)
    wait_for(lambda: file.read_bytes() == data)
    page.find("file").send_keys(str(file))
    wait_for(lambda: "written with the model small" in page.text("compress-status"))
    assert not page.find("slider").is_displayed()
    assert page.find("decoded").is_displayed()


def test_page_slider_is_keyboard_accessible(page, photo):
    """The slider moves by keyboard and reports its position to screen readers."""
    from selenium.webdriver.common.keys import Keys

    page.find("file").send_keys(str(photo))
    page.wait_shown("slider")
    slider = page.find("slider")
    for _ in range(10):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("aria-valuetext") == "60 percent original"
    clip = page.run("return getComputedStyle(arguments[0]).clipPath", page.find("original"))
    assert "40%" in clip


def test_page_generates_image_and_can_stop(page):
    """The page displays an image after each generation step and can stop the generation."""
    from selenium.webdriver.support.ui import Select

    assert [option.text for option in Select(page.find("class")).options] == [
        *(f"class {n}" for n in range(4)), "any class",
    ]  # fmt: skip
    Select(page.find("class")).select_by_visible_text("class 2")
    for name, value in (("steps", "6"), ("seed", "11")):
        page.find(name).clear()
        page.find(name).send_keys(value)
    page.find("start").click()
    wait_for(lambda: page.text("generate-status") == "Generated in 6 steps with seed 11.")
    assert page.find("generated").get_attribute("alt") == "Image of class 2, step 6 of 6"
    assert page.find("progress").get_attribute("value") == "6"
    page.find("steps").clear()
    page.find("steps").send_keys("256")
    page.find("start").click()
    wait_for(lambda: page.find("start").text == "Stop")
    page.find("start").click()
    wait_for(lambda: page.text("generate-status") == "Stopped.")


class NeverLoaded:
    async def metadata(self):
        return await asyncio.Event().wait()


def test_page_keeps_input_while_models_load(browser, serve):
    """Form input stays while another model is still loading."""
    from selenium.webdriver.support.ui import Select

    page = open_page(browser, serve(late={"tokenizer": NeverLoaded()}))
    page.wait_shown("generate")
    Select(page.find("class")).select_by_visible_text("class 3")
    page.find("steps").clear()
    page.find("steps").send_keys("7")
    count_requests_script = (
        "return performance.getEntriesByType('resource').filter((entry) => entry.name.endsWith('models')).length"
    )
    before = page.run(count_requests_script)
    wait_for(lambda: page.run(count_requests_script) >= before + 2)
    assert page.find("steps").get_attribute("value") == "7"
    assert Select(page.find("class")).first_selected_option.text == "class 3"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "street.mp4"
    path.write_bytes(make_street_video(30, size=(160, 96)))
    return path


def is_playing(page, name):
    return page.run("return arguments[0].readyState >= 2 && !arguments[0].paused", page.find(name))


def test_page_compares_video_with_reconstruction(page, clip, downloads, settings):
    """The page displays a video next to its reconstruction, and a .bsq file of a video alone."""
    page.find("file").send_keys(str(clip))
    page.wait_shown("videos")
    wait_for(lambda: "Done with the model clips" in page.text("compress-status"))
    compress_file(settings.models["clips"], str(clip), str(downloads / "expected.bsq"))
    data = (downloads / "expected.bsq").read_bytes()
    assert f"bits\n{8 * len(data):,}" in page.text("metrics")
    assert "frames\n30" in page.text("metrics")
    for name in ("original-video", "decoded-video"):
        wait_for(lambda name=name: page.run("return arguments[0].videoWidth", page.find(name)) == 160)
    assert not page.find("image-comparison").is_displayed()
    page.run("arguments[0].play()", page.find("decoded-video"))
    wait_for(lambda: is_playing(page, "decoded-video") and is_playing(page, "original-video"))
    page.run("arguments[0].pause(); arguments[0].currentTime = 0.6", page.find("original-video"))
    wait_for(lambda: not is_playing(page, "decoded-video"))
    get_time_script = "return arguments[0].currentTime"
    wait_for(lambda: page.run(get_time_script, page.find("decoded-video")) == pytest.approx(0.6, abs=0.1))
    page.find("download").click()
    file = downloads / "clip.bsq"
    wait_for(lambda: file.exists() and file.read_bytes() == data)
    page.find("file").send_keys(str(file))
    wait_for(lambda: "clip.bsq, written with the model clips" in page.text("compress-status"))
    assert page.find("decoded-video").is_displayed()
    assert not page.find("original-video").is_displayed()


def test_page_compresses_video_browser_cannot_play(page, tmp_path):
    """A video that the browser cannot play is still compressed."""
    (tmp_path / "raw.mkv").write_bytes(make_street_video(6, container_format="matroska", codec="ffv1"))
    page.find("file").send_keys(str(tmp_path / "raw.mkv"))
    page.wait_shown("decoded-video")
    wait_for(lambda: not page.find("original-video").is_displayed())


def test_page_unreadable_file_displays_error(page, tmp_path):
    """A file that is neither an image nor a video displays an error message."""
    (tmp_path / "note.txt").write_text("not an image")
    page.find("file").send_keys(str(tmp_path / "note.txt"))
    wait_for(lambda: "the body is not an image or video" in page.text("compress-status"))
    assert not page.find("result").is_displayed()


def test_page_downscales_large_photo_before_upload(page, tmp_path):
    """A large photo is downscaled before upload."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(noise).resize((2000, 1600)).save(tmp_path / "large.jpg")
    page.find("file").send_keys(str(tmp_path / "large.jpg"))
    page.wait_shown("result")
    get_size_script = "return [arguments[0].naturalWidth, arguments[0].naturalHeight]"
    assert page.run(get_size_script, page.find("decoded")) == [640, 512]
    wait_for(lambda: "Downscaled to 640 × 512 pixels" in page.text("compress-status"))


@pytest.mark.parametrize("width", [360, 1100])
def test_page_fits_width_and_labels_every_control(browser, url, photo, width):
    """The page fits its width and every control has an accessible name."""
    page = open_page(browser, url, width)
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
    # The keyboard reaches every control.
    assert page.run("return [...document.querySelectorAll('[tabindex]')].every((part) => part.tabIndex >= 0)")


def test_page_loads_only_own_resources_without_errors(browser, url, page, photo):
    """The page loads nothing from other hosts and the browser logs no errors."""
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    resource_urls = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert resource_urls
    assert all(name.startswith((url, "data:", "blob:")) for name in resource_urls)
    browser_errors = [entry for entry in browser.get_log("browser") if "status of 415" not in entry["message"]]
    assert browser_errors == []


def test_page_requires_token(browser, serve, photo):
    """The page requests the token and works after the correct one is entered."""
    page = open_page(browser, serve(TOKEN))
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


@pytest.fixture(scope="module")
def proxied(serve, start_server):
    """Return a function that starts a reverse proxy below a path prefix, and returns the URL of the page."""
    prefix = "/user/me/proxy/8000"

    def start(headers=(), **options):
        target = serve(**options)

        async def proxy(scope, receive, send):
            if scope["type"] != "http":
                return
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            path = scope["path"]
            status, response_headers, content = 404, [], b"outside of the prefix"
            if path.startswith(prefix):
                url = target + path.removeprefix(prefix).lstrip("/") + "?" + scope["query_string"].decode()
                sent = [(name, value) for name, value in scope["headers"] if name != b"host"]
                async with httpx.AsyncClient(timeout=120) as client:
                    response = await client.request(
                        scope["method"], url, content=body, headers=[*sent, *headers], follow_redirects=False
                    )
                status, content = response.status_code, response.content
                response_headers = [
                    (name.lower(), value) for name, value in response.headers.raw if name.lower() != b"content-length"
                ]
            await send({"type": "http.response.start", "status": status, "headers": response_headers})
            await send({"type": "http.response.body", "body": content})

        return start_server(proxy).rstrip("/") + prefix

    return start


@pytest.mark.parametrize("address", ["/", "", "/docs/"])
def test_page_works_behind_path_prefix(browser, proxied, photo, address):
    """The page compresses and generates behind a reverse proxy that adds a prefix to its path."""
    forwarded = [(b"x-forwarded-prefix", b"/user/me/proxy/8000")] if address == "" else []
    url = proxied(forwarded)
    page = open_page(browser, url + address)
    if address == "/docs/":
        assert browser.current_url == f"{url}/docs"
        browser.find_element("link text", "openapi.json")
        assert page.run("return getComputedStyle(document.body).maxWidth") != "none"
        return
    page.wait_shown("compress")
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    page.find("steps").clear()
    page.find("steps").send_keys("2")
    page.find("start").click()
    wait_for(lambda: page.text("generate-status").startswith("Generated in 2 steps"))
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith((url, "data:", "blob:")) for name in loaded)
    page.run("document.querySelector('nav a').click()")
    wait_for(lambda: browser.current_url == f"{url}/docs")


def test_page_small_image_omits_missing_metrics(page, photos, tmp_path):
    """An image too small for LPIPS is compressed and compared by PSNR alone."""
    photos[0].resize((20, 30)).save(tmp_path / "small.png")
    page.find("file").send_keys(str(tmp_path / "small.png"))
    page.wait_shown("sizes")
    assert "PSNR" in page.text("metrics")
    assert "LPIPS" not in page.text("metrics")
    assert len(page.text("size-rows").splitlines()) == 3

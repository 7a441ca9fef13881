"""Chromium, and pages of the service opened in it."""

import shutil
import time
from types import SimpleNamespace

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver; .ci/run installs them"
)


def start_browser(download_folder):
    """Return a driver of headless Chromium that saves downloads in this folder."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(download_folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def wait_for(condition, timeout_s=60):
    expires_at = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < expires_at, "timeout"
        time.sleep(0.05)
    return result


def open_page(browser, url, width=1100, height=900):
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

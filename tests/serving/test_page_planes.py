"""The page in a real browser with models of nested bits: images that become sharper, and the rate."""

import pytest
from local_service import save_models
from page_browser import needs_browser, open_page, wait_for
from small_codecs import save_nested_codec, save_nested_tokenizer
from small_videos import make_street_video

from bsq_ray import Codec
from bsq_ray.codec.files import compress_file
from bsq_ray.codec.rate import Rate
from bsq_ray.serving.service_config import Settings

pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore")]

# Records every text of the line below the image, with the image that was displayed at that time.
RECORD = """
    window.shown = [];
    new MutationObserver(() => shown.push([
      document.getElementById("planes").textContent, document.getElementById("decoded").src,
    ])).observe(document.getElementById("planes"), { childList: true });"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A prior of planes of 4, 8 and 10 bits, clips of 4, 7 and 10 bits, and a tokenizer without nested bits."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "nested": save_nested_codec(folder / "nested"),
        "clips": save_nested_tokenizer(folder / "clips", frames=2),
        "small": save_models(folder)["small"],
    }
    return Settings(models=models)


@pytest.fixture(scope="module")
def codec(settings):
    return Codec.from_pretrained(settings.models["nested"])


@pytest.fixture(scope="module")
def image(photos):
    return photos[0].resize((200, 150))


@pytest.fixture
def photo(image, tmp_path):
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def file(codec, image, tmp_path):
    """A .bsq file of three planes."""
    (tmp_path / "photo.bsq").write_bytes(codec.compress(image).data)
    return tmp_path / "photo.bsq"


def select_bits(page, bits):
    """Move the rate slider by keyboard."""
    from selenium.webdriver.common.keys import Keys

    while int(page.find("bits").get_attribute("value")) > bits:
        page.find("bits").send_keys(Keys.ARROW_LEFT)


def test_page_shows_image_sharper_with_each_plane(page, file, codec):
    """The page displays few bits first; the line below names the bits per token and the bytes of each image."""
    page.run(RECORD)
    page.find("file").send_keys(str(file))
    wait_for(lambda: "photo.bsq, written with the model nested" in page.text("compress-status"))
    data = file.read_bytes()
    first, second, _ = codec.plane_ends(data)
    lines, addresses = zip(*page.run("return shown"), strict=True)
    assert lines == (
        f"4 of 10 bits per token, from the first {first} of {len(data):,} bytes",
        f"8 of 10 bits per token, from the first {second} of {len(data):,} bytes",
        f"10 of 10 bits per token, from {len(data):,} bytes",
    )
    assert len(set(addresses)) == 3
    assert f"bits\n{8 * len(data):,}" in page.text("metrics")


def test_page_names_bits_of_cut_file(page, file, codec):
    """The page displays the last whole plane of a cut file, and reports that it is cut."""
    data = file.read_bytes()
    size = codec.plane_ends(data)[1]
    file.write_bytes(data[: size + 1])
    page.run(RECORD)
    page.find("file").send_keys(str(file))
    wait_for(lambda: page.text("planes") == f"8 of 10 bits per token, from {size} bytes, because the file is cut")
    assert len(page.run("return shown")) == 2


def test_page_compresses_at_selected_rate(page, photo, image, codec, downloads):
    """The slider selects the rate; moving it compresses the image again."""
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    assert page.text("bits-value") == "10 of 10"
    assert page.text("planes").startswith("10 of 10 bits per token, ")
    select_bits(page, 4)
    assert page.find("bits").get_attribute("aria-valuetext") == "4 of 10"
    data = codec.compress(image, rate=Rate(4)).data
    wait_for(lambda: page.text("planes") == f"4 of 4 bits per token, from {len(data):,} bytes")
    page.wait_shown("sizes")
    assert f"bytes\n{len(data)}" in page.text("metrics")
    assert page.text("size-rows").splitlines()[0].split() == ["this", ".bsq", "file", str(len(data))]
    page.find("download").click()
    wait_for(lambda: any(path.read_bytes() == data for path in downloads.glob("*.bsq")))


def test_page_without_nested_bits_has_no_rate(page, photo):
    """Only a model with nested bits has the slider; the files of other models are displayed at once."""
    from selenium.webdriver.support.ui import Select

    select_bits(page, 6)
    Select(page.find("codec")).select_by_visible_text("small")
    assert not page.find("bits").is_displayed()
    page.run(RECORD)
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    [[line, _]] = page.run("return shown")
    assert line.startswith("10 of 10 bits per token, from ")
    Select(page.find("codec")).select_by_visible_text("nested")
    assert page.find("bits").is_displayed()


def test_page_shows_clip_after_first_plane_and_whole(page, settings, tmp_path):
    """A clip is displayed twice, because every response is a whole video; the image's rate does not apply to it."""
    (tmp_path / "street.mp4").write_bytes(make_street_video(4, size=(96, 64)))
    select_bits(page, 4)
    page.run(RECORD)
    page.find("file").send_keys(str(tmp_path / "street.mp4"))
    wait_for(lambda: "Done with the model clips" in page.text("compress-status"))
    compress_file(settings.models["clips"], str(tmp_path / "street.mp4"), str(tmp_path / "street.bsq"))
    lines = [line for line, _ in page.run("return shown")]
    assert [line.split(",")[0] for line in lines] == ["4 of 10 bits per token", "10 of 10 bits per token"]
    assert lines[-1].endswith(f"from {(tmp_path / 'street.bsq').stat().st_size:,} bytes")


def test_page_keeps_comparison_while_planes_arrive(browser, url, photo):
    """The comparison is visible from the first plane on, and its slider stays where it is."""
    page = open_page(browser, url, width=360)
    page.wait_shown("compress")
    page.run("""
        const [result, slider] = ["result", "slider"].map((name) => document.getElementById(name));
        new MutationObserver((_, observer) => {
          if (result.hidden) return;
          observer.disconnect();
          window.first = document.getElementById("planes").textContent;
          slider.value = 80;
          slider.dispatchEvent(new Event("input"));
        }).observe(result, { attributes: true });""")
    page.find("file").send_keys(str(photo))
    page.wait_shown("sizes")
    assert page.run("return first").startswith("4 of 10 bits per token")
    assert page.find("slider").get_attribute("value") == "80"
    assert page.run("return document.documentElement.scrollWidth") <= 360

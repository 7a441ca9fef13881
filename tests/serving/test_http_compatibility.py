"""Requests as clients, monitors and proxies send them: HEAD, encoded bodies, trailing slashes and path prefixes."""

import base64
import gzip
import html.parser
import io
import json
import re
import zlib
from contextlib import suppress
from urllib.parse import urljoin

import imagecodecs
import numpy as np
import pytest
from local_service import make_app, save_models, wait_until_loaded
from PIL import Image
from starlette.testclient import TestClient

from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.http.content_encoding import decode_content, parse_content_encoding
from bsq_ray.serving.service_config import Limits, Settings

PREFIX = "/user/me/proxy/8000"
MAX_BODY = 500_000


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    limits = Limits(max_body_mb=MAX_BODY / 1e6, max_total_body_mb=1.0)
    return Settings(models=save_models(tmp_path_factory.mktemp("models")), limits=limits, authentication=False)


@pytest.fixture(scope="module")
def photo_file(photos):
    file = io.BytesIO()
    photos[0].resize((160, 120)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/page/script.js", "/page/style.css", "/healthz", "/metrics", "/v1/models"],
)
def test_head_returns_status_and_headers_of_get(client, path):
    """HEAD returns the status and the headers of GET, and no body."""
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.status_code == 200
    assert dict(head.headers) == dict(get.headers)
    assert int(head.headers["content-length"]) == len(get.content) > 0


@pytest.mark.parametrize(("path", "status"), [("/none", 404), ("/page/none.js", 404), ("/v1/encode", 405)])
def test_head_of_path_without_get_returns_error(client, path, status):
    """HEAD of other paths fails as GET does."""
    response = client.head(path)
    assert (response.status_code, response.content) == (status, b"")


def raw_deflate(data):
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def two_gzip_members(data):
    return gzip.compress(data[:99]) + gzip.compress(data[99:])


ENCODERS = [
    ("gzip", gzip.compress), ("x-gzip", gzip.compress), ("GZIP", two_gzip_members), ("deflate", zlib.compress),
    ("deflate", raw_deflate), ("br", imagecodecs.brotli_encode), ("zstd", imagecodecs.zstd_encode),
    ("identity", bytes), ("gzip, br", lambda data: imagecodecs.brotli_encode(gzip.compress(data))),
    ("identity, deflate ,zstd", lambda data: imagecodecs.zstd_encode(zlib.compress(data))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "encode"), ENCODERS)
def test_encoded_body_is_decoded(client, photo_file, name, encode):
    """A body that the client compressed gives the same result as the plain body, for files and for JSON."""
    headers = {"Content-Encoding": name}
    tokens = client.post("/v1/encode", content=photo_file).json()
    assert client.post("/v1/encode", content=encode(photo_file), headers=headers).json() == tokens
    decoded = client.post("/v1/decode", content=encode(json.dumps(tokens).encode()), headers=headers)
    assert decoded.content == client.post("/v1/decode", json=tokens).content


@pytest.mark.parametrize("name", ["compress", "lz4", "gzip, exi", "aws-chunked", "x" * 500])
def test_unknown_encoding_returns_415_with_its_name(client, photo_file, name):
    """An encoding that is not supported is named, before the body is read."""
    response = client.post("/v1/compress", content=photo_file, headers={"Content-Encoding": name})
    assert response.status_code == 415
    assert f"unsupported Content-Encoding {name.split(', ')[-1][:40]}" in response.json()["error"]
    assert response.headers["accept-encoding"] == "gzip, deflate, br, zstd"


def test_encoded_body_over_limit_returns_413(client):
    """A body that expands beyond the limit is rejected without being expanded."""
    zeros = bytes(100 * MAX_BODY)
    for name, encode in (("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", imagecodecs.zstd_encode)):
        response = client.post("/v1/encode", content=encode(zeros), headers={"Content-Encoding": name})
        assert (response.status_code, name in response.json()["error"]) == (413, True)
    nested = client.post(
        "/v1/encode", content=gzip.compress(gzip.compress(zeros)), headers={"Content-Encoding": "gzip, gzip"}
    )
    assert nested.status_code == 413
    brotli = client.post("/v1/encode", content=imagecodecs.brotli_encode(zeros), headers={"Content-Encoding": "br"})
    assert (brotli.status_code, "exceeds 0.5 MB" in brotli.json()["error"]) == (422, True)


def test_encoded_bodies_release_their_memory(client, photo_file):
    """The memory of decoded bodies is free again after each request, also after failed ones."""
    for _ in range(5):
        bomb = client.post("/v1/encode", content=gzip.compress(bytes(10**7)), headers={"Content-Encoding": "gzip"})
        damaged = client.post("/v1/encode", content=b"no gzip", headers={"Content-Encoding": "gzip"})
        good = client.post("/v1/encode", content=gzip.compress(photo_file), headers={"Content-Encoding": "gzip"})
        assert [response.status_code for response in (bomb, damaged, good)] == [413, 422, 200]


@pytest.mark.parametrize(("name", "encode"), ENCODERS)
def test_decode_content_damaged_or_truncated_raises(photo_file, name, encode):
    """Damaged and truncated streams raise 422, or decode to something of a limited size."""
    encodings = parse_content_encoding(name)
    encoded = encode(photo_file)
    assert decode_content(encoded, encodings, MAX_BODY) == photo_file
    if not encodings:
        return
    for damaged in (encoded[:-1], b"\0" + encoded, encoded + b"junk", b"not compressed"):
        with suppress(ApiError):
            assert len(decode_content(damaged, encodings, MAX_BODY)) <= MAX_BODY
    with pytest.raises(ApiError):
        decode_content(encoded[: len(encoded) // 2], encodings, MAX_BODY)
    with pytest.raises(ApiError):
        decode_content(encoded, encodings, len(photo_file) - 1)


@pytest.mark.parametrize("root_path", ["", "/bsq"])
@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/docs/", "../docs"), ("/v1/models/", "../models"), ("/v1/encode/?model=a&b=%20", "../encode?model=a&b=%20"),
        ("/none/", "../none"),
    ],
)  # fmt: skip
def test_trailing_slash_redirects_relatively(settings, replicas, root_path, path, location):
    """A trailing slash redirects to a relative address, so that it works behind every prefix, with its query."""
    app = make_app(settings, replicas)
    client = TestClient(app, "http://127.0.0.1", root_path=root_path, follow_redirects=False)
    response = client.post(root_path + path)
    assert (response.status_code, response.headers["location"]) == (307, location)
    here = f"http://127.0.0.1{root_path}{path}"
    assert urljoin(here, location).split("?")[0] == here.split("?")[0].rstrip("/")


def test_prefix_without_slash_redirects_to_page(settings, replicas):
    """The prefix of a Ray Serve application without its slash redirects to the page."""
    client = TestClient(make_app(settings, replicas), "http://127.0.0.1", root_path="/a/bsq", follow_redirects=False)
    response = client.get("/a/bsq")
    assert (response.status_code, response.headers["location"]) == (307, "./bsq/")
    assert client.get("/a/bsq/").status_code == 200
    assert client.get("/a/bsq/docs//").status_code == 404


class Links(html.parser.HTMLParser):
    """Addresses in a page."""

    def __init__(self):
        super().__init__()
        self.found, self.base = [], None

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "base":
            self.base = attrs["href"]
        else:
            self.found += [attrs[name] for name in ("href", "src", "action") if attrs.get(name)]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_link_relatively(client, path):
    """All addresses in the pages and their files stay below the prefix of a proxy."""
    links = Links()
    links.feed(client.get(path).text)
    links = [link for link in links.found if not link.startswith("data:")]
    assert links
    for link in links:
        target = urljoin(f"http://host{PREFIX}{path}", link)
        assert target.startswith(f"http://host{PREFIX}/")
        assert client.get(target.removeprefix(f"http://host{PREFIX}")).status_code == 200
    script = client.get("/page/script.js").text
    assert re.findall(r"""["'`]v1/\w+""", script)
    assert not re.findall(r"""["'`]/\w""", script + client.get("/page/style.css").text)


def test_openapi_servers_are_relative(client):
    """Generated clients send requests below the prefix of the proxy that they read the schema through."""
    schema = client.get("/openapi.json").json()
    [server] = schema["servers"]
    base = urljoin(f"http://host{PREFIX}/openapi.json", server["url"])
    assert base.rstrip("/") == f"http://host{PREFIX}"


@pytest.mark.parametrize(
    ("header", "base"),
    [
        ("/user/me/proxy/8000", "/user/me/proxy/8000/"), ("/a/", "/a/"), ("/outer, /inner", "/outer/inner/"),
        ("/a%20b/~c", "/a%20b/~c/"), ("", None), ("/", None), ("//evil.example", None), ('/"><script>', None),
        ("https://evil.example", None), ("/a//b", None), ("a", None),
    ],
)  # fmt: skip
def test_forwarded_prefix_becomes_base(client, header, base):
    """A proxy's prefix becomes the base of the page's links; anything that is not a plain path is ignored."""
    for path in ("/", "/docs"):
        response = client.get(path, headers={"X-Forwarded-Prefix": header})
        links = Links()
        links.feed(response.text)
        assert links.base == base
        assert response.headers["vary"] == "X-Forwarded-Prefix"


@pytest.mark.parametrize("size", [(1, 1), (30, 200), (31, 31), (64, 64)])
def test_measure_small_image_has_null_metrics(client, photos, size):
    """A metric that does not exist for so small an image is null."""
    file = io.BytesIO()
    photos[0].resize(size).save(file, "PNG")
    report = client.post("/v1/measure", content=file.getvalue())
    assert report.status_code == 200, report.text
    exists = min(size) >= 31
    assert (report.json()["lpips"] is not None) == exists
    assert set(report.json()["equal"]) == ({"psnr", "lpips"} if exists else {"psnr"})
    assert report.json()["psnr"] > 0


def test_measure_image_wider_than_webp_allows(client):
    """A codec that has no files of this size has no size to compare."""
    file = io.BytesIO()
    Image.fromarray(np.arange(16400, dtype=np.uint8)[None].repeat(1, 0)).save(file, "PNG")
    report = client.post("/v1/measure", content=file.getvalue())
    assert report.status_code == 200, report.text
    assert report.json()["equal"]["psnr"]["WebP"] is None


def test_client_reads_base64_tokens_through_gzip(settings, replicas):
    """HTTP libraries that send gzip by default work with JSON requests."""
    with TestClient(make_app(settings, replicas), "http://localhost.") as client:
        wait_until_loaded(client)
        body = {"grid": [1, 8, 8], "bits": 10, "packed": base64.b64encode(bytes(128)).decode()}
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        response = client.post("/v1/decode", content=gzip.compress(json.dumps(body).encode()), headers=headers)
        assert response.status_code == 200

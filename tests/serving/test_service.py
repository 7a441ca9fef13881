"""The service on Ray Serve: responses do not depend on load, and no client affects another one."""

import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from local_service import save_models, save_video_models
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from small_videos import make_street_video

from bsq_ray.media.video_reader import read_video
from bsq_ray.serving.server import serve_app
from bsq_ray.serving.service_config import Limits, Settings

TOKEN = "the-token-of-this-test"


@pytest.fixture(scope="module")
def service(ray_local, tmp_path_factory):
    """Return the URL of a service with image and video tokenizers, a prior and a generator; it requires a token."""
    limits = Limits(max_body_mb=4, max_ongoing_requests=16, request_timeout_s=90)
    folder = tmp_path_factory.mktemp("served")
    models = save_models(folder) | {"clips": save_video_models(folder)["clips"]}
    # All deployments together must fit into the CPUs of the session.
    role_settings = {name: {"num_cpus": 0.25} for name in ("tokenizer", "codec", "generator")}
    settings = Settings(models=models, limits=limits, **role_settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BSQ_RAY_TOKEN", TOKEN)
        with serve_app(settings, "127.0.0.1", 0) as server:
            assert server.token == TOKEN
            yield server.url


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def files(photos):
    """Return photos as files of different sizes and formats."""
    files = []
    for n, photo in enumerate(photos):
        file = io.BytesIO()
        photo.resize((120 + 8 * n, 160)).save(file, ("JPEG", "PNG", "WEBP")[n % 3])
        files.append(file.getvalue())
    return files


def find_actors(name):
    """Return handles of Ray Serve's actors whose name contains `name`."""
    import ray

    return [
        ray.get_actor(actor["name"], namespace=actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if name in actor["name"]
    ]


def post_concurrently(client, requests, concurrency):
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda request: client.post(f"/v1/{request[0]}", content=request[1]), requests))


def test_image_response_under_load_equals_idle_response(client, files):
    """Responses to images under load equal those to single requests."""
    kinds = ("encode", "reconstruct", "compress")
    requests = [(kind, file) for file in files for kind in kinds]
    expected = [client.post(f"/v1/{kind}", content=file) for kind, file in requests]
    assert {response.status_code for response in expected} == {200}
    responses = post_concurrently(client, requests * 2, 12)
    for request, idle, loaded in zip(requests * 2, expected * 2, responses, strict=True):
        assert loaded.status_code == 200, loaded.text
        assert loaded.content == idle.content, request[0]


def test_video_response_under_load_equals_idle_response(client, files):
    """Responses to videos under load equal those to single requests."""
    clips = [make_street_video(6 + n, start=40 * n) for n in range(3)]
    requests = [(kind, clip) for clip in clips for kind in ("encode", "reconstruct", "compress")]
    expected = [client.post(f"/v1/{kind}", content=clip) for kind, clip in requests]
    assert {response.status_code for response in expected} == {200}
    assert {response.headers.get("x-model") or response.json()["model"] for response in expected} == {"clips"}
    images = [("encode", file) for file in files]
    responses = post_concurrently(client, requests * 2 + images, 8)
    assert {response.status_code for response in responses[-len(images) :]} == {200}
    for request, idle, loaded in zip(requests * 2, expected * 2, responses, strict=False):
        assert loaded.status_code == 200, loaded.text
        assert loaded.content == idle.content, request[0]
    decoded = client.post("/v1/decompress", content=expected[2].content, headers={"Accept": "video/mp4"})
    assert len(list(read_video(io.BytesIO(decoded.content)).frames)) == 6


def test_generate_concurrent_requests_match_single_ones(client):
    """Generated images do not depend on other requests in the same batch."""
    bodies = [f'{{"class": {n % 4}, "seed": {n}, "steps": {3 + n % 3}}}'.encode() for n in range(8)]
    expected = [client.post("/v1/generate", content=body).text for body in bodies]
    responses = post_concurrently(client, [("generate", body) for body in bodies], 8)
    assert [response.text for response in responses] == expected


def num_multi_request_batches(text):
    """Return the number of encoding batches with more than one request; Ray's histogram sums are approximate."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    buckets = [
        (sample.labels["le"], sample.value)
        for sample in samples
        if sample.name == "ray_serve_bsq_batch_size_bucket" and sample.labels["function"] == "encode"
    ]
    return sum(value for upper, value in buckets if upper == "+Inf") - sum(
        value for upper, value in buckets if upper == "1.0"
    )


def test_metrics_cover_deployments_and_batch_sizes(client, files):
    """The metrics cover every deployment and report batches of more than one request."""
    post_concurrently(client, [("encode", files[0])] * 32, 16)
    for _ in range(30):
        text = client.get("/metrics").text
        if "ray_serve_deployment_request_counter" in text and num_multi_request_batches(text) > 0:
            break
        time.sleep(1)
    assert num_multi_request_batches(text) > 0
    for name in ("ingress", "tokenizer-small", "codec-prior", "generator-generator"):
        assert f'deployment="{name}"' in text
    assert all(line.startswith(("ray_serve_", "# HELP ray_serve_", "# TYPE ray_serve_")) for line in text.splitlines())


def test_request_without_token_returns_401(service, files):
    """Without the token the API returns 401, while the page stays public."""
    assert httpx.post(f"{service}v1/encode", content=files[0]).status_code == 401
    assert httpx.get(service).status_code == 200


def resident_mb(name):
    """Return the resident MB of processes with `name` in their title."""
    return sum(
        process.memory_info().rss / 1e6
        for process in psutil.process_iter(["name", "cmdline"])
        if name in " ".join(process.info["cmdline"] or [])
    )


def connect(service):
    host, port = service.removeprefix("http://").strip("/").split(":")
    return socket.create_connection((host, int(port)))


def request_head(request, length):
    return f"POST /v1/{request} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{length}\r\n\r\n".encode()


@pytest.mark.slow
def test_oversized_upload_is_cut_off_at_limit(service, client, files):
    """An upload without a declared length is cut off at the limit, and the proxy's memory stays bounded."""
    before, peak_mb, sent = resident_mb("ProxyActor"), 0.0, 0
    head = (
        f"POST /v1/compress HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
    with connect(service) as stream:
        stream.sendall(head)
        try:
            for _ in range(1024):
                stream.sendall(chunk)
                sent += 1
                if sent % 16 == 0:
                    peak_mb = max(peak_mb, resident_mb("ProxyActor"))
            response = stream.recv(1000)
        except OSError:
            response = b""
    assert sent < 900
    assert peak_mb - before < 300
    print(f"cut off after {sent} MiB, the proxy used {peak_mb - before:.0f} MB more; response {response[:12]!r}")
    assert client.post("/v1/encode", content=files[0]).status_code == 200
    rejected = client.post("/v1/compress", content=bytes(5_000_000))
    assert rejected.status_code == 413


@pytest.mark.slow
def test_slow_readers_use_bounded_memory(service, client, photos):
    """A slow reader of a large image blocks another large response with 429, but not a small one."""
    image_file = io.BytesIO()
    photos[0].resize((2900, 2900)).save(image_file, "JPEG")
    data = client.post("/v1/compress", content=image_file.getvalue()).content
    decompressed = client.post("/v1/decompress", content=data)
    print(f"{len(data):,} bytes became {len(decompressed.content):,}")
    assert 5e6 < len(decompressed.content) < 8e6
    with connect(service) as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        idle.sendall(request_head("decompress", f"Content-Length: {len(data)}") + data)
        assert idle.recv(12) == b"HTTP/1.1 200"
        rejected = client.post("/v1/decompress", content=data)
        assert rejected.status_code == 429
        assert rejected.headers["retry-after"] == "1"
        assert client.post("/v1/encode", content=image_file.getvalue()).status_code == 200
    assert client.post("/v1/decompress", content=data).content == decompressed.content


@pytest.mark.slow
def test_disconnected_clients_release_slots(service, client):
    """Sixteen long generations fill the service; after their clients disconnect, the next one is served."""
    body = b'{"class": 1, "steps": 256, "guidance_scale": 1}'
    head = (
        f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    streams = [connect(service) for _ in range(16)]
    for stream in streams:
        stream.sendall(head + body)
    for stream in streams:
        assert stream.recv(15).startswith(b"HTTP/1.1 200")
    rejected = client.post("/v1/generate", content=body)
    assert rejected.status_code == 429
    assert rejected.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    for _ in range(100):
        response = client.post("/v1/generate", content=b'{"class": 1, "steps": 2}', headers={"Accept": "image/png"})
        if response.status_code == 200:
            break
        time.sleep(0.1)
    assert response.status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reconstruct", "compress"])
def test_killed_replica_loses_no_request(client, files, kind):
    """All requests get correct responses although the only replica is killed during them."""
    import ray

    expected = [client.post(f"/v1/{kind}", content=file).content for file in files]
    killed = threading.Event()

    def kill():
        time.sleep(0.5)
        for actor in find_actors("tokenizer-small"):
            ray.kill(actor)
            killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    responses = post_concurrently(client, [(kind, file) for file in files] * 8, 12)
    killer.join()
    assert killed.is_set()
    assert [response.status_code for response in responses] == [200] * len(responses)
    assert [response.content for response in responses] == expected * 8


@pytest.mark.slow
def test_generate_resumes_after_replica_is_killed(service, client):
    """A generation stream continues without a gap after its replica is killed."""
    import ray

    body = {"class": 3, "seed": 9, "steps": 40, "guidance_scale": 2}
    expected = client.post("/v1/generate", json=body).text.splitlines()
    with client.stream("POST", "/v1/generate", json=body) as response:
        lines = []
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 5:
                for actor in find_actors("generator-generator"):
                    ray.kill(actor)
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
    assert lines == expected


def test_healthz_responds_while_large_images_decode(client, files):
    """The health check responds while large images are decoded."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)).save(file, "PNG")
    with ThreadPoolExecutor(4) as pool:
        long = [pool.submit(client.post, "/v1/encode", content=file.getvalue()) for _ in range(3)]
        start_time = time.monotonic()
        assert client.get("/healthz").status_code == 200
        print(f"healthz during three large images took {time.monotonic() - start_time:.2f} s")
        assert {response.result().status_code for response in long} == {200}

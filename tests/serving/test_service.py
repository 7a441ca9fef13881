"""The service on real Ray Serve: answers do not depend on load, and nothing a client does harms another one."""

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
from local_service import save_clip_models, save_models
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from small_videos import make_street_video

from bsq_ray.media.video_files import read_video
from bsq_ray.serving.server import running
from bsq_ray.serving.service_config import Limits, Settings

TOKEN = "the-token-of-this-test"


@pytest.fixture(scope="module")
def service(ray_local, tmp_path_factory):
    """URL of a service with tokenizers of images and clips, a prior and a generator, that asks for a token."""
    limits = Limits(body_mb=4, waiting=16, seconds=90)
    folder = tmp_path_factory.mktemp("served")
    models = save_models(folder) | {"clips": save_clip_models(folder)["clips"]}
    # Each deployment's share is small, because the session's CPUs are counted.
    parts = {name: {"cpus": 0.25} for name in ("tokenizer", "codec", "generator")}
    settings = Settings(models=models, limits=limits, **parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BSQ_RAY_TOKEN", TOKEN)
        with running(settings, "127.0.0.1", 0) as served:
            assert served.token == TOKEN
            yield served.url


@pytest.fixture
def client(service):
    with httpx.Client(base_url=service, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def files(photos):
    """Photographs as files, each of another size and format."""
    files = []
    for n, photo in enumerate(photos):
        file = io.BytesIO()
        photo.resize((120 + 8 * n, 160)).save(file, ("JPEG", "PNG", "WEBP")[n % 3])
        files.append(file.getvalue())
    return files


def actors(name):
    """Handles of Ray Serve's actors whose name contains `name`."""
    import ray

    return [
        ray.get_actor(actor["name"], namespace=actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if name in actor["name"]
    ]


def ask(client, requests, at_once):
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda request: client.post(f"/v1/{request[0]}", content=request[1]), requests))


def test_every_answer_under_load_is_the_answer_alone(client, files):
    kinds = ("encode", "reconstruct", "compress")
    requests = [(kind, file) for file in files for kind in kinds]
    alone = [client.post(f"/v1/{kind}", content=file) for kind, file in requests]
    assert {answer.status_code for answer in alone} == {200}
    together = ask(client, requests * 2, 12)
    for request, one, other in zip(requests * 2, alone * 2, together, strict=True):
        assert other.status_code == 200, other.text
        assert other.content == one.content, request[0]


def test_every_answer_to_a_video_under_load_is_the_answer_alone(client, files):
    clips = [make_street_video(6 + n, start=40 * n) for n in range(3)]
    requests = [(kind, clip) for clip in clips for kind in ("encode", "reconstruct", "compress")]
    alone = [client.post(f"/v1/{kind}", content=clip) for kind, clip in requests]
    assert {answer.status_code for answer in alone} == {200}
    assert {answer.headers.get("x-model") or answer.json()["model"] for answer in alone} == {"clips"}
    images = [("encode", file) for file in files]
    together = ask(client, requests * 2 + images, 8)
    assert {answer.status_code for answer in together[-len(images) :]} == {200}
    for request, one, other in zip(requests * 2, alone * 2, together, strict=False):
        assert other.status_code == 200, other.text
        assert other.content == one.content, request[0]
    shown = client.post("/v1/decompress", content=alone[2].content, headers={"Accept": "video/mp4"})
    assert len(list(read_video(io.BytesIO(shown.content)).frames)) == 6


def test_generated_images_do_not_depend_on_others_that_are_drawn_with_them(client):
    bodies = [f'{{"class": {n % 4}, "seed": {n}, "steps": {3 + n % 3}}}'.encode() for n in range(8)]
    alone = [client.post("/v1/generate", content=body).text for body in bodies]
    together = ask(client, [("generate", body) for body in bodies], 8)
    assert [answer.text for answer in together] == alone


def batches_of_several(text):
    """Batches of the tokenizer's encoding that held more than one request; Ray's sum of a histogram is only a guess."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    buckets = [
        (sample.labels["le"], sample.value)
        for sample in samples
        if sample.name == "ray_serve_bsq_batch_size_bucket" and sample.labels["function"] == "encode"
    ]
    return sum(value for upto, value in buckets if upto == "+Inf") - sum(
        value for upto, value in buckets if upto == "1.0"
    )


def test_the_metrics_of_every_deployment_are_there_and_tell_that_requests_are_computed_together(client, files):
    ask(client, [("encode", files[0])] * 32, 16)
    for _ in range(30):
        text = client.get("/metrics").text
        if "ray_serve_deployment_request_counter" in text and batches_of_several(text) > 0:
            break
        time.sleep(1)
    assert batches_of_several(text) > 0
    for name in ("front", "tokenizer-small", "codec-prior", "generator-draws"):
        assert f'deployment="{name}"' in text
    assert all(line.startswith(("ray_serve_", "# HELP ray_serve_", "# TYPE ray_serve_")) for line in text.splitlines())


def test_without_the_token_nothing_is_done(service, files):
    assert httpx.post(f"{service}v1/encode", content=files[0]).status_code == 401
    assert httpx.get(service).status_code == 200


def memory(name):
    """Resident MB of the processes of this Ray session with that title."""
    return sum(
        process.memory_info().rss / 1e6
        for process in psutil.process_iter(["name", "cmdline"])
        if name in " ".join(process.info["cmdline"] or [])
    )


def connected(service):
    host, port = service.removeprefix("http://").strip("/").split(":")
    return socket.create_connection((host, int(port)))


def head_of(request, length):
    return f"POST /v1/{request} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{length}\r\n\r\n".encode()


@pytest.mark.slow
def test_a_gigabyte_is_cut_off_and_costs_others_nothing(service, client, files):
    """Sent in pieces without a length, as fast as it goes."""
    before, most, sent = memory("ProxyActor"), 0.0, 0
    head = (
        f"POST /v1/compress HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    piece = b"100000\r\n" + bytes(2**20) + b"\r\n"
    with connected(service) as stream:
        stream.sendall(head)
        try:
            for _ in range(1024):
                stream.sendall(piece)
                sent += 1
                if sent % 16 == 0:
                    most = max(most, memory("ProxyActor"))
            answer = stream.recv(1000)
        except OSError:
            answer = b""
    assert sent < 900
    assert most - before < 300
    print(f"cut off after {sent} MiB, the proxy took {most - before:.0f} MB more; answer {answer[:12]!r}")
    assert client.post("/v1/encode", content=files[0]).status_code == 200
    refused = client.post("/v1/compress", content=bytes(5_000_000))
    assert refused.status_code == 413


@pytest.mark.slow
def test_clients_that_do_not_read_are_not_given_all_memory(service, client, photos):
    """The picture is larger than what the connection itself can hold, and two of them than what is allowed."""
    picture = io.BytesIO()
    photos[0].resize((2900, 2900)).save(picture, "JPEG")
    data = client.post("/v1/compress", content=picture.getvalue()).content
    whole = client.post("/v1/decompress", content=data)
    print(f"{len(data):,} bytes became {len(whole.content):,}")
    assert 5e6 < len(whole.content) < 8e6
    with connected(service) as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        idle.sendall(head_of("decompress", f"Content-Length: {len(data)}") + data)
        assert idle.recv(12) == b"HTTP/1.1 200"
        refused = client.post("/v1/decompress", content=data)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert client.post("/v1/encode", content=picture.getvalue()).status_code == 200
    assert client.post("/v1/decompress", content=data).content == whole.content


@pytest.mark.slow
def test_clients_that_go_away_give_their_turn_back(service, client):
    """Sixteen long drawings fill the service; their clients leave, and the next one is served."""
    body = b'{"class": 1, "steps": 256, "guidance": 1}'
    head = (
        f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    streams = [connected(service) for _ in range(16)]
    for stream in streams:
        stream.sendall(head + body)
    for stream in streams:
        assert stream.recv(15).startswith(b"HTTP/1.1 200")
    refused = client.post("/v1/generate", content=body)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    for _ in range(100):
        answer = client.post("/v1/generate", content=b'{"class": 1, "steps": 2}', headers={"Accept": "image/png"})
        if answer.status_code == 200:
            break
        time.sleep(0.1)
    assert answer.status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("role", ["tokenizer-small", "codec-small"])
def test_a_killed_replica_loses_no_request(client, files, role):
    """The only replica is killed while requests are under way: each one is still answered, and rightly."""
    import ray

    kind = {"tokenizer-small": "reconstruct", "codec-small": "compress"}[role]
    expected = [client.post(f"/v1/{kind}", content=file).content for file in files]
    killed = threading.Event()

    def kill():
        time.sleep(0.5)
        for actor in actors(role):
            ray.kill(actor)
            killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    answers = ask(client, [(kind, file) for file in files] * 8, 12)
    killer.join()
    assert killed.is_set()
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert [answer.content for answer in answers] == expected * 8


@pytest.mark.slow
def test_a_drawing_goes_on_where_its_replica_was_killed(service, client):
    import ray

    body = {"class": 3, "seed": 9, "steps": 40, "guidance": 2}
    expected = client.post("/v1/generate", json=body).text.splitlines()
    with client.stream("POST", "/v1/generate", json=body) as answer:
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) == 5:
                for actor in actors("generator-draws"):
                    ray.kill(actor)
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
    assert lines == expected


def test_pictures_are_read_while_one_waits(client, files):
    """An image whose decoding takes long does not stop the health check."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)).save(file, "PNG")
    with ThreadPoolExecutor(4) as pool:
        long = [pool.submit(client.post, "/v1/encode", content=file.getvalue()) for _ in range(3)]
        began = time.monotonic()
        assert client.get("/healthz").status_code == 200
        print(f"healthz beside three large pictures took {time.monotonic() - began:.2f} s")
        assert {answer.result().status_code for answer in long} == {200}

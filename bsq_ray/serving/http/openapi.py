"""What the endpoints take and give, for `/openapi.json` and, as a page without scripts, for `/docs`."""

from __future__ import annotations

from html import escape
from typing import Any

from starlette.responses import Response

_BINARY_SCHEMA = {"type": "string", "format": "binary"}
_MODEL_PARAMETER = {"name": "model", "in": "query", "required": False, "schema": {"type": "string"},
          "description": "name or id of the model; default: the first one that can"}  # fmt: skip
_IMAGE_CONTENT, _BSQ_CONTENT = (
    {"image/*": {"schema": _BINARY_SCHEMA}},
    {"application/x-bsq": {"schema": _BINARY_SCHEMA}},
)
_MEDIA_CONTENT = {**_IMAGE_CONTENT, "video/*": {"schema": _BINARY_SCHEMA}}
_PNG_CONTENT = {"image/png": {"schema": _BINARY_SCHEMA}}
_DECODED_CONTENT = {
    **_PNG_CONTENT,
    "video/mp4": {"schema": _BINARY_SCHEMA},
    "video/x-matroska": {"schema": _BINARY_SCHEMA},
}
_GENERATED_CONTENT = {**_PNG_CONTENT, "image/webp": {"schema": _BINARY_SCHEMA}}
_JSON_CONTENT = {"application/json": {"schema": {"type": "object"}}}
_ERROR_RESPONSES = {
    401: "the bearer token is missing or wrong", 403: "no token is asked for, and the host is not this machine",
    404: "no such model", 413: "too many bytes, or pixels in all frames",
    415: "not a file of the kind that is wanted", 422: "damaged, or a value that cannot be",
    429: "too many requests are under way or answers being read: come again after Retry-After seconds",
    503: "models are being loaded, or the answer took too long",
}  # fmt: skip

_GENERATE_SCHEMA = {
    "type": "object",
    "required": ["class"],
    "properties": {
        **{key: {"type": "integer"} for key in ("class", "seed", "steps")},
        **{key: {"type": "number"} for key in ("guidance", "temperature")},
        "model": {"type": "string"},
    },
}

# Summary, body, answer, and what else is to be known.
_ENDPOINTS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any], str]] = {
    "encode": (
        "Image or video to tokens", _MEDIA_CONTENT, _JSON_CONTENT,
        "Pictures are resized and cropped to the model's square. grid is frames, rows, columns; packed is base64: for "
        "each token ceil(bits / 8) bytes, bit 1 least significant. Of a video also rate, frames per second. A model of "
        "images takes a video frame by frame.",
    ),
    "decode": (
        "Tokens to image or video", _JSON_CONTENT, _DECODED_CONTENT,
        "The body is what encode answers. A video is MP4 (H.264); with Accept: video/x-matroska MKV (FFV1, lossless).",
    ),
    "reconstruct": (
        "Image or video to what is left of it", _MEDIA_CONTENT, _DECODED_CONTENT,
        "Encode and decode in one, of the model's square; of a video as decode answers. Headers: X-Bits-Per-Pixel, "
        "X-PSNR (mean over frames), X-Frames of a video.",
    ),
    "compress": (
        "Image or video to .bsq file", _MEDIA_CONTENT, _BSQ_CONTENT,
        "Of any size; sound is left out. Videos are MP4, MOV, 3GP, MKV, WebM, AVI, Ogg and WMV; the first model of "
        "clips takes them if model names none. Headers: X-Bits-Per-Pixel, X-Frames of a video.",
    ),
    "decompress": (
        ".bsq file to image or video", _BSQ_CONTENT, _DECODED_CONTENT,
        "The file says which model is needed. A clip becomes MKV (FFV1, every byte as it was decoded); with Accept: "
        "video/mp4 MP4 (H.264), as players and browsers take it.",
    ),
    "measure": (
        "Rate and quality of an image", _IMAGE_CONTENT, _JSON_CONTENT,
        "Bits per pixel, PSNR, LPIPS, and the sizes of JPEG and WebP files of equal PSNR and of equal LPIPS.",
    ),
    "generate": (
        "Class to image or clip", {"application/json": {"schema": _GENERATE_SCHEMA}},
        {"application/x-ndjson": {"schema": {}}, **_GENERATED_CONTENT},
        "A line of JSON after each step, its image a data URL. With Accept: image/png the image only; clips are "
        "animated WebP.",
    ),
    "models": ("Models, what they offer, and whether they are loaded", None, _JSON_CONTENT, ""),
    "healthz": ("Whether all models are loaded", None, _JSON_CONTENT, "Needs no token."),
    "metrics": ("Metrics for Prometheus", None, {"text/plain": {"schema": {"type": "string"}}}, ""),
}  # fmt: skip


def route_options(name: str) -> dict[str, Any]:
    """Arguments of the route decorator."""
    summary, body, response_content, description = _ENDPOINTS[name]
    extra: dict[str, Any] = (
        {"parameters": [_MODEL_PARAMETER]} if body in (_IMAGE_CONTENT, _MEDIA_CONTENT) or name == "decompress" else {}
    )
    if body is not None:
        extra["requestBody"] = {"required": True, "content": body}
    error_responses = (
        {code: {"description": text} for code, text in _ERROR_RESPONSES.items()} if body is not None else {}
    )
    responses = {200: {"description": "done", "content": response_content}, **error_responses}
    options = {
        "summary": summary,
        "description": description,
        "openapi_extra": extra,
        "responses": responses,
        "name": name,
    }
    # Otherwise every answer would be described as JSON, too.
    return {**options, "response_class": Response}


def render_html(schema: dict[str, Any]) -> str:
    """The OpenAPI description as a page."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            request_types = ", ".join(route.get("requestBody", {}).get("content", {})) or "nothing"
            response_types = ", ".join(route["responses"]["200"]["content"])
            error_items = "".join(
                f"<li>{code}: {escape(answer['description'])}</li>"
                for code, answer in route["responses"].items()
                if code != "200"
            )
            parts.append(
                f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(route['summary'])}. "
                f"{escape(route.get('description', ''))}</p><p>Takes {escape(request_types)}; gives {escape(response_types)}.</p>"
                + (f"<details><summary>Refusals</summary><ul>{error_items}</ul></details>" if error_items else "")
                + "</section>"
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        '<title>bsq_ray: HTTP interface</title><link rel="stylesheet" href="/page/style.css"></head><body class="docs">'
        '<main><h1>HTTP interface</h1><p>The same in machine-readable form: <a href="/openapi.json">openapi.json</a>. '
        f"Bodies are files as they are.</p>{''.join(parts)}</main></body></html>"
    )

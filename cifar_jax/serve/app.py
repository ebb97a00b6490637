"""The page and the JSON endpoints of ``cifar_jax.serve``, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import functools
import hashlib
import io
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.data import shapes
from cifar_jax.data.images import png, png_uri, read_image
from cifar_jax.data.sources import is_here
from cifar_jax.errors import CifarJaxError
from cifar_jax.networks.layers import ACTIVATIONS, trace_layers
from cifar_jax.scoring.inference import make_logits, softmax
from cifar_jax.scoring.labelled import load_labelled
from cifar_jax.steps.parallel import compile_lowered
from cifar_jax.steps.train_step import normalize

MAX_BYTES = 10 * 2**20
# A body over the limit is still read up to here, as most clients read the reply only after sending.
_MAX_BYTES_READ = 10 * MAX_BYTES
_MAX_SECONDS = 60  # for a body to arrive
_MAX_SAMPLES = 12

Predict = Callable[[bytes, str], dict[str, Any]]


def make_app(network: TrainedNetwork, hosts: Sequence[str]) -> Starlette:
    """The page at ``/``, and JSON: ``GET /network``, ``GET /samples``, ``POST /predict``.

    Args:
        hosts: the host names that it answers to, ``*`` for any.
    """
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    security = {"Content-Security-Policy": _content_security_policy(html)}
    predict = make_predict(network)
    # One thread, so that no two large images are decoded at once; and always the same one, as
    # threads do not share the memory that they free.
    worker = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    samples = functools.cache(lambda: _in_a_thread_of_its_own(lambda: find_samples(network)))
    description = {
        "model": network.config.model,
        "parameters": network.n_params,
        "classes": network.class_names,
        "image_shape": network.image_shape,
        "max_bytes": MAX_BYTES,
    }

    async def on_page(request: Request) -> Response:
        return HTMLResponse(html, headers=security)

    async def on_network(request: Request) -> Response:
        return JSONResponse(description)

    async def on_samples(request: Request) -> Response:
        return JSONResponse(await asyncio.wrap_future(samples()))

    async def on_predict(request: Request) -> Response:
        name = request.query_params.get("file") or "the image"
        kind = request.headers.get("content-type", "").lower()
        # This also keeps other sites' pages out: without a preflight they cannot send these types.
        if not kind.startswith(("image/", "application/octet-stream")):
            return refuse(415, "the body is not an image. Fix: give Content-Type: image/jpeg, say.")
        try:
            async with asyncio.timeout(_MAX_SECONDS):
                content = await _body(request)
        except ClientDisconnect:
            return Response()  # the client is gone
        except TimeoutError:
            return refuse(408, f"{name} did not arrive within {_MAX_SECONDS} s. Fix: try again.")
        if content is None:
            return refuse(413, f"{name} has over {MAX_BYTES >> 20} MiB. Fix: make it smaller.")
        try:
            answer = asyncio.get_running_loop().run_in_executor(worker, predict, content, name)
            return JSONResponse(await answer)
        except CifarJaxError as error:
            return refuse(422, str(error))

    def refuse(status: int, error: str) -> Response:
        return JSONResponse({"error": error}, status)

    return Starlette(
        routes=[
            Route("/", on_page),
            Route("/network", on_network),
            Route("/samples", on_samples),
            Route("/predict", on_predict, methods=["POST"]),
        ],
        middleware=[
            Middleware(_answer_when_cancelled),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
        ],
    )


def _answer_when_cancelled(app: ASGIApp) -> ASGIApp:
    """Answer requests that are cancelled when the server stops, which is not an error to report."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            await JSONResponse({"error": "the server was stopped"}, 503)(scope, receive, send)

    return answer


def _content_security_policy(html: str) -> str:
    """A policy that allows only the page's own style and script, and no requests elsewhere."""

    def digest(tag: str) -> str:
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest('style')}'; "
        f"script-src 'sha256-{digest('script')}'; img-src data: blob:; connect-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _body(request: Request) -> bytes | None:
    """The body, or None if it has more than ``MAX_BYTES``."""
    content, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BYTES:
            content += chunk
        elif size > _MAX_BYTES_READ:
            break
    return bytes(content) if size <= MAX_BYTES else None


def make_predict(network: TrainedNetwork) -> Predict:
    """A function from an image file's content and name to the answer of ``POST /predict``.

    Everything is compiled, and was run once, when this returns.

    Raises:
        NumericsError: the network's logits are not finite. The function raises this too, and
            ``DataError`` for a file that is not an image.
    """

    def trace(variables: Any, images: Any) -> Any:
        normalised = normalize(images, network.mean, network.std)
        return trace_layers(network.model, variables, normalised)

    black = np.zeros((1, *network.image_shape), np.uint8)
    variables = jax.device_put(network.variables)
    # The kinds of layers whose outputs are shown.
    layers = jax.eval_shape(trace, variables, black)
    kinds = [layer.kind if layer.output.ndim == 4 else "" for layer in layers]
    features = None
    if "conv" in kinds:
        first = kinds.index("conv")
        after = (i for i, kind in enumerate(kinds) if kind in ACTIVATIONS and i > first)
        shown = next(after, first)
        lowered = jax.jit(lambda *given: trace(*given)[shown].output).lower(variables, black)
        features = compile_lowered(lowered, jax.default_backend())
    logits = make_logits(network)

    def predict(content: bytes, name: str) -> dict[str, Any]:
        start = time.perf_counter()
        image = read_image(io.BytesIO(content), name, network.image_shape)[None]
        values = softmax(logits(image))[0]
        maps = np.asarray(features(variables, image))[0] if features else np.zeros((0, 0, 0))
        best = int(values.argmax())
        return {
            "file": name,
            "class": network.class_names[best],
            "probability": float(values[best]),
            "probabilities": dict(zip(network.class_names, map(float, values), strict=True)),
            "network_input": png_uri(image[0]),
            "feature_maps": [png_uri(_stretched(each)) for each in np.moveaxis(maps, -1, 0)],
            "seconds": time.perf_counter() - start,
        }

    predict(png(black[0]), "a black image")
    return predict


def _in_a_thread_of_its_own(function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """The future result of ``function``; unlike a pool's, its thread does not delay exit."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # so that the thread can always finish it

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def find_samples(network: TrainedNetwork) -> list[dict[str, str]]:
    """Sample test images, one per class, if the training data is on this machine; else none.

    Takes seconds if files are to be decoded, which starts TensorFlow.
    """
    config, names = network.config, network.class_names
    if names == shapes.CLASS_NAMES:
        some = shapes.draw(100, seed=1)  # the first images of the test split
        images, labels = some[0][: len(names)], some[1][: len(names)]
        files = [f"{name}.png" for name in names]
    elif not is_here(config.data, config.data_dir):
        return []
    else:
        try:
            labelled = load_labelled(network, "test", data=None, data_dir=None)
            labels, first = np.unique(labelled.split.labels, return_index=True)
            images = labelled.pixels(first[:_MAX_SAMPLES])
        except CifarJaxError:  # it has changed since
            return []
        files = [labelled.file_name(index) for index in first]
    return [
        {"class": names[label], "file": file, "image": png_uri(pixels)}
        for label, file, pixels in zip(labels, files, images, strict=False)
    ]


def _stretched(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """``values`` scaled from black, the lowest, to white, the highest."""
    shifted = values - values.min()
    return (255 * shifted / max(shifted.max(), 1e-12)).astype("uint8")

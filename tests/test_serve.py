from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import uvicorn
from conftest import pixels_of
from PIL import Image

from cifar_jax.checkpoints import trained
from cifar_jax.checkpoints.trained import TrainedNetwork
from cifar_jax.config import TrainConfig
from cifar_jax.data import shapes
from cifar_jax.data.images import read_image
from cifar_jax.errors import CifarJaxError, ExitCode
from cifar_jax.scoring.inference import make_logits, softmax
from cifar_jax.serve import __main__ as command
from cifar_jax.serve import app
from cifar_jax.serve.__main__ import main
from cifar_jax.serve.app import MAX_BYTES, _stretched, find_samples, make_predict

SCRIPT = "<script>alert(1)</script>"
MARKUP = "<img src=x onerror=alert(2)>"


def linear(class_names: tuple[str, ...], size: int = 8) -> TrainedNetwork:
    kernel = np.zeros((size * size * 3, len(class_names)), np.float32)
    bias = np.arange(len(class_names), dtype=np.float32)
    variables = {"params": {"Dense_0": {"kernel": kernel, "bias": bias}}, "batch_stats": {}}
    ones = (1.0, 1.0, 1.0)
    config = TrainConfig(model="linear", data="nowhere")
    return TrainedNetwork(config, class_names, (size, size, 3), ones, ones, variables)


@contextlib.contextmanager
def serving(checkpoint: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command at work: where it answers, and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_jax.serve", "--checkpoint", str(checkpoint), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at http://127.0.0.1:" in line, line
            yield line.split(" at ")[1].split()[0], process
        finally:
            process.kill()


@contextlib.contextmanager
def serving_here(network: TrainedNetwork) -> Iterator[tuple[str, uvicorn.Server, threading.Thread]]:
    """The application in a thread: where it answers, the server and the thread."""
    config = uvicorn.Config(
        app.make_app(network, ["*"]),
        port=0,
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=0,
    )
    server = uvicorn.Server(config)
    serving = threading.Thread(target=server.run)
    serving.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/", server, serving
    finally:
        server.should_exit = True
        serving.join()


@pytest.fixture(scope="module")
def url(trained_run: Path) -> Iterator[str]:
    with serving(trained_run) as (url, process):
        yield url
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
        assert "Traceback" not in stderr, stderr


def noise_file(size: int = 40, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size + 9, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def ask(
    url: str, body: Any = None, *, kind: str = "image/jpeg", **headers: str
) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an answer."""
    if body is not None:
        headers["Content-Type"] = kind
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


# ------------------------------------------------------------------------------------- answers


def test_an_answer_is_what_the_network_says(url: str, trained_run: Path) -> None:
    network = trained.load(trained_run)
    content = noise_file()
    status, answer = ask(f"{url}predict?file=my%20cat.jpg", content)
    assert status == 200
    image = read_image(io.BytesIO(content), "x", network.image_shape)
    expected = softmax(make_logits(network)(image[None]))[0]
    assert list(answer["probabilities"]) == ["bird", "cat", "frog"]
    np.testing.assert_allclose(list(answer["probabilities"].values()), expected, rtol=1e-6)
    assert answer["class"] == network.class_names[expected.argmax()]
    assert answer["probability"] == max(answer["probabilities"].values())
    assert answer["file"] == "my cat.jpg"
    assert 0 < answer["seconds"] < 60
    np.testing.assert_array_equal(pixels_of(answer["network_input"]), image)

    # The first convolution by hand, as shifted products; then ReLU, then black to white.
    convolution = network.variables["params"]["Conv_0"]
    inputs = (image / 255 - network.mean) / network.std
    padded = np.pad(inputs, [(1, 1), (1, 1), (0, 0)])
    maps = convolution["bias"] + sum(
        padded[i : i + 8, j : j + 8] @ convolution["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    maps = np.maximum(maps, 0)
    maps -= maps.min(axis=(0, 1))
    maps /= np.maximum(maps.max(axis=(0, 1)), 1e-12)
    shown = np.stack([pixels_of(uri) for uri in answer["feature_maps"]], axis=-1)
    assert shown.shape == (8, 8, 4)
    assert shown.max() == 255
    np.testing.assert_allclose(shown, 255 * maps, atol=1.01)


def test_maps_are_stretched_from_black_to_white() -> None:
    values = np.array([[-1, 1], [3, 3]], np.float32)
    np.testing.assert_array_equal(_stretched(values), [[0, 127], [255, 255]])
    np.testing.assert_array_equal(_stretched(np.full((2, 2), 7.0)), np.zeros((2, 2)))


def test_a_network_without_convolutions_has_no_feature_maps() -> None:
    answer = make_predict(linear(("a", "b")))(noise_file(), "x")
    assert answer["class"] == "b"
    assert answer["feature_maps"] == []


def test_a_network_that_gives_no_numbers_is_not_served() -> None:
    network = linear(("a", "b"))
    variables = jax.tree.map(lambda leaf: leaf * np.nan, network.variables)
    with pytest.raises(CifarJaxError, match="are not finite") as caught:
        make_predict(dataclasses.replace(network, variables=variables))
    assert caught.value.exit_code == ExitCode.NUMERICS


def test_samples(trained_run: Path, image_folder: Path, tmp_path: Path) -> None:
    network = trained.load(trained_run)
    samples = find_samples(network)
    assert [sample["class"] for sample in samples] == ["bird", "cat", "frog"]
    assert samples[1]["file"] == "cat/000.png"
    expected = read_image(image_folder / "test" / "cat" / "000.png", "x", (8, 8, 3))
    np.testing.assert_array_equal(pixels_of(samples[1]["image"]), expected)
    (tmp_path / "emptied").mkdir()
    for data in ("gone", "emptied"):
        elsewhere = dataclasses.replace(network.config, data=str(tmp_path / data))
        assert find_samples(dataclasses.replace(network, config=elsewhere)) == []
    drawn = find_samples(linear(shapes.CLASS_NAMES, 32))
    assert tuple(sample["class"] for sample in drawn) == shapes.CLASS_NAMES
    test_images, _ = shapes.draw(shapes.N_TEST, seed=1)
    for index in (3, 9):
        np.testing.assert_array_equal(pixels_of(drawn[index]["image"]), test_images[index])


def test_many_at_a_time_get_their_own_answers(url: str) -> None:
    files = [noise_file(seed=seed) for seed in range(12)]
    alone = [ask(f"{url}predict", file)[1]["probabilities"] for file in files]
    assert len({str(probabilities) for probabilities in alone}) > 1
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda file: ask(f"{url}predict", file)[1], files))
    assert [answer["probabilities"] for answer in together] == alone


def test_others_are_answered_while_an_image_is_decoded(url: str) -> None:
    file = io.BytesIO()
    Image.new("L", (7900, 8000)).save(file, "PNG", compress_level=1)
    meanwhile = 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, f"{url}predict", file.getvalue())
        time.sleep(0.15)
        while not slow.done():
            ask(f"{url}network")
            meanwhile += not slow.done()
        assert slow.result()[0] == 200
    assert meanwhile


# ------------------------------------------------------------------------------------ refusals


def test_what_is_no_image_is_refused(url: str) -> None:
    for body, kind, status, message in (
        (b"a plain text", "text/plain", 415, "the body is not an image"),
        (b"a plain text", "application/octet-stream", 422, "n.txt is not an image of a format"),
        (b"", "Image/JPEG", 422, "n.txt is empty"),
        (noise_file()[:600], "image/jpeg", 422, "n.txt is cut short"),
    ):
        answered, answer = ask(f"{url}predict?file=n.txt", body, kind=kind)
        assert answered == status
        assert list(answer) == ["error"]
        assert message in answer["error"]
        assert "Fix: " in answer["error"]


def test_what_is_too_large_is_refused(url: str) -> None:
    fits, large = bytes(MAX_BYTES), bytes(MAX_BYTES + 1)
    assert ask(f"{url}predict", fits)[0] == 422
    status, answer = ask(f"{url}predict?file=huge.png", large)
    assert (status, answer["error"]) == (413, "huge.png has over 10 MiB. Fix: make it smaller.")
    chunked = iter([large[: len(large) // 2], large[len(large) // 2 :]])  # with no Content-Length
    assert ask(f"{url}predict", chunked)[0] == 413
    host, port = url.split("/")[2].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(10**15))
    connection.endheaders()
    status = 413
    with contextlib.suppress(ConnectionError):  # it hangs up, or its answer comes first
        for _ in range(12):
            connection.send(large)
        status = connection.getresponse().status
    assert status == 413
    connection.close()


@pytest.mark.fault("A23")
def test_a_sender_who_leaves_leaves_no_trace(trained_run: Path) -> None:
    """Nor does one who stalls keep the server from ending."""
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    with serving(trained_run) as (url, process):
        host, port = url.split("/")[2].split(":")
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(head + b"Content-Length: 100\r\n\r\nabc")
        assert ask(f"{url}predict", noise_file())[0] == 200
        with socket.create_connection((host, int(port))) as stalled:
            stalled.sendall(head + b"Content-Length: 100\r\n\r\nabc")
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in stderr, stderr
        assert "cifar_jax: stopped by SIGTERM" in stderr


@pytest.mark.fault("A23")
def test_a_sender_who_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_MAX_SECONDS", 0.2)
    with serving_here(linear(("a", "b"))) as (url, _, _):
        host, port = url.split("/")[2].split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.putrequest("POST", "/predict?file=slow.png")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"abc")
        answer = connection.getresponse()
        assert answer.status == 408
        assert json.load(answer) == {
            "error": "slow.png did not arrive within 0.2 s. Fix: try again."
        }
        connection.close()
        assert ask(f"{url}predict", noise_file())[0] == 200


def test_other_sites_are_kept_out(url: str) -> None:
    host, port = url.split("/")[2].split(":")

    def status(name: str) -> int:
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("GET", "/network", headers={"Host": name})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    for name in ("127.0.0.1", "localhost", "[::1]"):
        assert status(name) == status(f"{name}:{port}") == 200
    for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert status(name) == 400
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"Origin": "http://a.b"})
    ) as page:
        assert not [name for name in page.headers if name.lower().startswith("access-control")]
        policy = page.headers["Content-Security-Policy"]
        assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith("base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    assert "unsafe" not in policy


def test_who_is_let_in(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From this machine, whoever calls it by its names; else anyone, with a warning."""
    let_in: list[list[str]] = []
    monkeypatch.setattr(app, "make_app", lambda network, hosts: let_in.append(hosts))
    monkeypatch.setattr(trained, "load", lambda path: linear(("a", "b")))
    monkeypatch.setattr(uvicorn, "Config", lambda app, **options: None)
    server = types.SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr(uvicorn, "Server", lambda config: server)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])
    own = ["localhost", "127.0.0.1", "[::1]"]
    for host, address, hosts, shown in (
        ("127.0.0.1", "127.0.0.1", ["127.0.0.1", *own], "127.0.0.1"),
        ("MyPC", "127.0.1.1", ["mypc", *own], "MyPC"),  # browsers ask for it in small letters
        ("::1", "::1", ["::1", *own], "[::1]"),
        ("0.0.0.0", "0.0.0.0", ["*"], "0.0.0.0"),
        ("::", "::", ["*"], "[::]"),
    ):
        listener = types.SimpleNamespace(getsockname=lambda address=address: (address, 80, 0, 0))
        listening = contextlib.nullcontext(listener)
        monkeypatch.setattr(command, "_listen", lambda host, port, it=listening: it)
        main(["--checkpoint", str(trained_run), "--host", host])
        assert let_in.pop() == hosts
        out, err = capsys.readouterr()
        assert f" at http://{shown}:80/ " in out
        assert (f"warning: --host {host} lets anyone who can reach it in" in err) == (
            hosts == ["*"]
        )


def test_what_keeps_the_server_from_starting(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*argv: str) -> tuple[int, str]:
        with pytest.raises(CifarJaxError) as caught:
            main(argv)
        return caught.value.exit_code, str(caught.value)

    run = ("--checkpoint", str(trained_run))
    code, message = refusal()
    assert code == ExitCode.USAGE
    assert "--checkpoint" in message
    assert refusal("--checkpoint", str(tmp_path / "no"))[0] == ExitCode.CHECKPOINT
    assert refusal("--checkpoint", str(tmp_path), "--port", "0")[0] == ExitCode.CHECKPOINT
    assert refusal(*run, "--port", "65536")[0] == ExitCode.USAGE
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, message = refusal(*run, "--port", str(port))
        assert code == ExitCode.ENVIRONMENT
        assert message.startswith(
            f"cannot listen on port {port} of 127.0.0.1: Address already in use. Fix: give another "
            "--port"
        )
    for host in ("192.0.2.1", "no..name"):  # an address of another machine; a name of none
        code, message = refusal(*run, "--host", host, "--port", "0")
        assert code == ExitCode.ENVIRONMENT
        assert f"cannot listen on port 0 of {host}: " in message
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, message = refusal(*run)
    assert code == ExitCode.ENVIRONMENT
    assert message == (
        "cifar_jax.serve needs uvicorn, which is not installed. Fix: pip install starlette uvicorn."
    )


# ------------------------------------------------------------------------------------ the page


@contextlib.contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """The page, which must neither complain nor ask anyone else."""
    page = browser.new_page(**options)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.locator("#network", has_text="classes").wait_for()
    yield page
    # Chromium itself tells of each answer that is an error.
    assert [text for text in troubles if "the server responded with a status of" not in text] == []
    assert [other for other in asked if not other.startswith((url, "data:", "blob:"))] == []
    width, inner = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= inner, "it scrolls sideways"
    page.close()


def shown(page: Any) -> tuple[str, list[tuple[str, str]]]:
    """The class, and the bars' names and numbers."""
    page.locator("#result").wait_for()
    bars = [tuple(bar.inner_text().split("\n")) for bar in page.locator("#bars li").all()]
    return page.locator("#class").inner_text(), bars


def expected(answer: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    ordered = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
    return answer["class"], [(name, f"{100 * p:.1f} %") for name, p in ordered]


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_shows_what_predict_answers(
    browser: Any, url: str, image_folder: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    path = tmp_path / "a <b> & c.png"
    path.write_bytes((image_folder / "test" / "frog" / "000.png").read_bytes())
    _, answer = ask(f"{url}predict", path.read_bytes())
    assert answer["class"] == "frog", "the last in the order of the classes"
    viewport = {"width": width, "height": 800}
    with opened(browser, url, viewport=viewport, color_scheme=scheme) as page:
        assert page.locator("#network").inner_text().startswith("cnn, ")
        page.locator("input[type=file]").set_input_files(path)
        assert shown(page) == expected(answer)
        widths = page.locator(".bar").evaluate_all(
            "bars => bars.map(b => parseFloat(b.style.width))"
        )
        probabilities = sorted(answer["probabilities"].values(), reverse=True)
        np.testing.assert_allclose(widths, np.multiply(100, probabilities), atol=1e-3)
        assert answer["class"] in page.locator("[aria-live]").inner_text()
        assert page.locator("#original-caption").inner_text() == path.name
        assert page.locator("#seen").get_attribute("src") == answer["network_input"]
        maps = page.locator("#maps img").evaluate_all("maps => maps.map(map => map.src)")
        assert maps == answer["feature_maps"]
        page.locator("#samples button").first.wait_for()
        page.wait_for_load_state("networkidle")
        images = page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
        assert len(images) == 3 + 2 + 4  # samples, the two pictures, feature maps
        assert all(images)
        left, right = page.locator("main > div").all()
        beside = right.bounding_box()["x"] > left.bounding_box()["x"]
        assert beside == (width > 1000)


def test_images_come_by_drop_paste_and_keyboard(browser: Any, url: str) -> None:
    transfer = """content => {
        const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        if (content) transfer.items.add(new File([bytes], "given.jpg", {type: "image/jpeg"}));
        return transfer;
    }"""
    paste = """transfer => document.body.dispatchEvent(
        new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}))"""
    with opened(browser, url) as page:
        page.on("filechooser", lambda chooser: None)  # early: to subscribe takes a moment
        for seed, way in enumerate(("drop", "paste")):
            content = noise_file(seed=seed)
            given = page.evaluate_handle(transfer, base64.b64encode(content).decode())
            if way == "drop":
                page.dispatch_event("body", "drop", {"dataTransfer": given})
            else:
                page.evaluate(paste, given)
            _, answer = ask(f"{url}predict", content)
            page.locator(f'#seen[src="{answer["network_input"]}"]').wait_for()
            assert shown(page) == expected(answer)
        page.evaluate(paste, page.evaluate_handle(transfer, ""))
        assert "What was pasted is not a file." in page.locator("#error").inner_text()

        page.locator("#samples button").first.wait_for()
        page.keyboard.press("Tab")
        with page.expect_file_chooser():
            page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.locator("#original-caption", has_text="cat/000.png").wait_for()
        assert page.locator("#error").is_hidden()


def test_the_page_says_what_is_wrong(browser: Any, url: str, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(noise_file())
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "huge.png").write_bytes(bytes(MAX_BYTES + 1))
    sent = []
    with opened(browser, url) as page:
        page.on("request", lambda request: sent.append(request.method))
        for name, message in (("notes.txt", "is not an image"), ("huge.png", "has over 10 MiB.")):
            page.locator("input[type=file]").set_input_files(tmp_path / "image.jpg")
            shown(page)
            assert page.locator("#error").is_hidden()
            page.locator("input[type=file]").set_input_files(tmp_path / name)
            page.locator("#error", has_text=f"{name} {message}").wait_for()
            assert page.locator("#result").is_hidden()
            assert page.locator("[aria-live]").inner_text() == ""
    assert sent.count("POST") == 3, "what is too large is not even sent"


def test_on_a_phone_the_answer_comes_into_sight(browser: Any, url: str) -> None:
    with opened(browser, url, viewport={"width": 360, "height": 360}) as page:
        page.locator("#samples button").first.click()
        shown(page)
        in_sight = "element => element.getBoundingClientRect().bottom <= window.innerHeight + 1"
        assert page.locator("#class").evaluate(in_sight)


def test_a_late_answer_is_not_shown(browser: Any, url: str, tmp_path: Path) -> None:
    held: list[Any] = []
    with opened(browser, url) as page:
        page.route("**/predict?*", lambda route: held.append(route))
        for n in range(2):
            (tmp_path / f"{n}.jpg").write_bytes(noise_file(seed=n))
            page.locator("input[type=file]").set_input_files(tmp_path / f"{n}.jpg")
            while len(held) == n:
                page.wait_for_timeout(20)
        held[1].continue_()
        page.locator("#original-caption", has_text="1.jpg").wait_for()
        held[0].continue_()
        page.wait_for_timeout(300)
        assert page.locator("#original-caption").inner_text() == "1.jpg"
        assert page.locator("#error").is_hidden()


@pytest.mark.parametrize("path", ["samples", "predict"])
def test_its_end_does_not_wait_and_reports_no_error(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer that takes longer than the server's end is given up, without a traceback.

    Of two questions for samples one looks for them; of two images one is decoded at a time, and the
    second is not begun any more.
    """
    waited_enough, begun = threading.Event(), []

    def slow(*arguments: Any) -> list[Any]:
        begun.append(arguments)
        waited_enough.wait(30)
        return []

    monkeypatch.setattr(app, "find_samples", slow)
    monkeypatch.setattr(app, "make_predict", lambda network: slow)
    body = b"an image" if path == "predict" else None
    with (
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        serving_here(linear(("a", "b"))) as (url, server, serving),
    ):
        answers = [pool.submit(ask, f"{url}{path}", body) for _ in range(2)]
        while len(server.server_state.tasks) < 2 or not begun:
            time.sleep(0.01)
        server.should_exit = True
        serving.join(1)
        waited_enough.set()
        serving.join()
        assert [answer.result()[0] for answer in answers] == [503, 503]
    assert len(begun) == 1
    assert [record.exc_info for record in caplog.records if record.levelname == "ERROR"] == [None]


def test_ctrl_c_does_not_wait_for_the_samples(trained_run: Path) -> None:
    """Which takes seconds where TensorFlow decodes them."""
    program = f"""if True:
        import sys, time
        from cifar_jax import cli
        from cifar_jax.serve import __main__, app
        def find_samples(network):
            print("looking", flush=True)
            time.sleep(60)
        app.find_samples = find_samples
        sys.argv = ["serve", "--checkpoint", {str(trained_run)!r}, "--port", "0"]
        cli.run(__main__.main)
    """
    command = [sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        port = int(re.findall(r":(\d+)/", process.stdout.readline())[0])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /samples HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert process.stdout.readline() == "looking\n"
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=20)  # not 60
    assert process.returncode == 128 + signal.SIGINT
    assert (stdout, stderr) == ("", "cifar_jax: stopped by SIGINT\n")


def test_names_are_text_and_only_the_most_probable_are_shown(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(noise_file())
    network = linear((*"abcdefghij", MARKUP, SCRIPT))
    with serving_here(network) as (url, *_), opened(browser, url) as page:
        assert page.locator("#samples").is_hidden()
        page.locator("input[type=file]").set_input_files(path)
        answer, bars = shown(page)
        assert answer == SCRIPT
        assert bars[:2] == [(SCRIPT, "63.2 %"), (MARKUP, "23.3 %")]
        assert [name for name, _ in bars[2:]] == list("jihgfedc")
        assert page.locator("#rest:visible").inner_text() == "and 2 less probable classes"
        assert "has no convolution" in page.locator("#maps").inner_text()

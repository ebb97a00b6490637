"""A page to try a trained network on images: ``python -m cifar_jax.serve --checkpoint DIR``."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_jax import cli
from cifar_jax.checkpoints.workdir import step_folder
from cifar_jax.errors import ResourceError
from cifar_jax.options import CHECKPOINT_HELP, REQUIRED, Options, option

DESCRIPTION = """\
Try a trained network in a browser: drop, paste or choose an image, and see the class, all
probabilities, the image as the network sees it, and what its first layer finds in it.

For programs, POST /predict takes an image file as the body and answers in JSON.

examples:
  python -m cifar_jax.serve --checkpoint runs/20261122-101500-cnn
  curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' \\
      'http://127.0.0.1:8000/predict?file=cat.jpg'
"""


@dataclasses.dataclass(frozen=True)
class ServeOptions(Options):
    """Which network to serve, and where."""

    checkpoint: str = option(REQUIRED, CHECKPOINT_HELP)
    host: str = option(
        "127.0.0.1",
        "address to listen on; any but 127.0.0.1 and ::1 lets other machines connect",
    )
    port: int = option(8000, "port to listen on; 0 takes a free one", at_least=0, at_most=65535)


def serve(options: ServeOptions) -> None:
    """Serve the page and the JSON endpoints until a signal comes.

    Raises:
        CheckpointError: there is no network.
        ResourceError: starlette or uvicorn is missing, or the port cannot be used.
    """
    step_folder(Path(options.checkpoint))  # fail early, before the slow imports of trained.load
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"cifar_jax.serve needs {error.name}, which is not installed",
            fix="pip install starlette uvicorn",
        ) from error
    with _listen(options.host, options.port) as listener:  # before the seconds that loading takes
        from cifar_jax.checkpoints import trained
        from cifar_jax.serve.app import make_app

        address, port = listener.getsockname()[:2]
        hosts = ["*"]
        if ipaddress.ip_address(address).is_loopback:
            # Protects from DNS rebinding: a foreign page whose name resolves to this machine.
            hosts = [options.host.lower(), "localhost", "127.0.0.1", "[::1]"]
        network = trained.load(Path(options.checkpoint))
        config = uvicorn.Config(
            make_app(network, hosts),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            headers=[("X-Content-Type-Options", "nosniff")],
            timeout_graceful_shutdown=1,
        )
        # Giving up on unfinished requests at the end is not an error.
        logging.getLogger("uvicorn.error").addFilter(lambda record: "graceful" not in record.msg)
        if hosts == ["*"]:
            warning = f"warning: --host {options.host} lets anyone who can reach it in, no password"
            print(warning, file=sys.stderr)
        name = f"[{options.host}]" if ":" in options.host else options.host
        print(
            f"cifar_jax is serving {network.config.model} ({network.n_params:,} parameters, "
            f"{len(network.class_names)} classes) at http://{name}:{port}/  -  stop with Ctrl-C",
            flush=True,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:  # names with empty parts are the latter
        reason = (getattr(error, "strerror", None) or str(error)).split(" (")[0]
        raise ResourceError(
            f"cannot listen on port {port} of {host}: {reason}",
            fix="give another --port, where 0 takes a free one, or another --host",
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(
        ServeOptions, prog="python -m cifar_jax.serve", description=DESCRIPTION
    )
    serve(ServeOptions(**parser.parse_given(argv)))


if __name__ == "__main__":
    cli.run(main, beside_training=True)

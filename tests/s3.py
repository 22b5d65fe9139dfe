"""An S3 server on loopback, and an environment that leads every client to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
import s3fs


@contextmanager
def s3_bucket(patch: pytest.MonkeyPatch, name: str = "bucket") -> Iterator[str]:
    """Inside, ``s3://<name>`` is an empty bucket; yields that URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        use_endpoint(patch, f"http://{host}:{port}")
        # All servers of a process share what they store.
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem().mkdir(name)
        yield f"s3://{name}"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def use_endpoint(patch: pytest.MonkeyPatch, url: str) -> None:
    """Lead new S3 clients of this process, and of those it starts, to ``url``."""
    patch.setenv("AWS_ENDPOINT_URL", url)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # fsspec keeps clients, with the endpoint that they were made for.
    s3fs.S3FileSystem.clear_instance_cache()

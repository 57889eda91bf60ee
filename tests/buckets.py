"""A bucket of an S3 service that runs in this process (moto), and how storage is told of it. Knows no store."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SECRET = "a-secret-that-no-log-may-show"


@contextmanager
def s3_service() -> Iterator[str]:
    """Its url. Skips where moto is not installed."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(service: str) -> str:
    """The url of an empty bucket there."""
    import boto3

    name = f"bucket-{secrets.token_hex(6)}"
    boto3.client("s3", endpoint_url=service).create_bucket(Bucket=name)
    return f"s3://{name}/prefix"


def use_s3(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    """The usual AWS environment, pointing there; file systems that were opened for another one are forgotten."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", service)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

"""Payloads by way of a store that several machines see: a shared directory, memory, and a real S3 server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsplit.disk.remote_store import RemoteStore, without_password
from fedsplit.errors import ExchangeError, RecordError, UsageError
from tests.programs import free_port, programs

CONTENT = os.urandom(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3-compatible server of moto on loopback, with an empty bucket."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    server.start()
    endpoint = f"http://127.0.0.1:{server._port}"
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": endpoint,
                "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="payloads")
        yield "s3://payloads/run"
    server.stop()


@pytest.fixture(params=["directory", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return "memory://payloads" if request.param == "memory" else f"file://{tmp_path}/shared"


def test_a_payload_goes_there_and_comes_back(url: str, tmp_path: Path) -> None:
    store, source, target = RemoteStore(url), tmp_path / "source", tmp_path / "target"
    source.write_bytes(CONTENT)
    store.give(source, DIGEST)
    store.give(source, DIGEST)
    assert store.take(DIGEST, target) == target
    assert target.read_bytes() == CONTENT
    store.drop(DIGEST)
    store.drop(DIGEST)
    with pytest.raises(RecordError, match="is not in"):
        store.take(DIGEST, target)


def test_bytes_that_do_not_match_their_name_are_refused(url: str, tmp_path: Path) -> None:
    store, source, target = RemoteStore(url), tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"something else")
    other = hashlib.sha256(b"expected").hexdigest()
    store.give(source, other)
    with pytest.raises(RecordError, match="has digest"):
        store.take(other, target)
    assert not target.exists()
    store.drop(other)


def test_only_digests_are_opened(url: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="not a SHA-256"):
        RemoteStore(url).take("../secret", tmp_path / "target")
    assert RemoteStore(url).read_nonce("../secret") is None


def test_a_nonce_proves_that_both_see_the_same_store(url: str) -> None:
    name, content = RemoteStore(url).put_nonce()
    assert RemoteStore(url).read_nonce(name) == content
    RemoteStore(url).drop(name)
    assert RemoteStore(url).read_nonce(name) is None


def test_a_store_that_cannot_be_written_is_told_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    source = tmp_path / "source"
    source.write_bytes(b"x")
    with pytest.raises(ExchangeError, match="cannot write"):
        RemoteStore(f"file://{tmp_path}/file/below").give(source, hashlib.sha256(b"x").hexdigest())
    assert without_password("ftp://me:sec@ret@host/place") == "ftp://…@host/place"
    with pytest.raises(UsageError, match="nonsense"):
        RemoteStore("nonsense://place")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_five_programs_come_to_the_same_bits_by_way_of_a_remote_store(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shared = tmp_path / "shared"
    url = f"file://{shared}" if kind == "directory" else str(request.getfixturevalue("s3"))
    ends = []
    for name, setting in (("remote", url), ("messages", "none")):
        directory = tmp_path / name
        directory.mkdir()
        flags = ("--payload-store", setting)
        with programs(directory, client_flags=flags, server_flags=("--rounds", "2", *flags)) as federation:
            federation.start_all()
            assert set(federation.wait().values()) == {0}, federation.tails()
            ends.append(federation.final_state().read_bytes())
            way = "payloads by reference" if name == "remote" else "payloads in messages"
            assert way in federation.log("server")
    assert ends[0] == ends[1]
    if kind == "directory":
        # The last state is still there for whoever asks; nothing else is.
        assert len(list(shared.iterdir())) <= 1

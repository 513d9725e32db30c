"""Fixtures of object stores: servers that run for the whole session, buckets for one test, and faults in between.

A test module says ``pytest_plugins = ["object_stores"]``. Each server starts when a test first asks for it. A test that
asks for SeaweedFS is marked ``s3``, for Azurite ``azurite``; the parameters below bring their marks along.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from servers import Server
from servers.azurite import VARIABLE, azurite, find_azurite
from servers.fake_gs import fake_gs
from servers.fake_hf import fake_hf
from servers.fault_proxy import FaultProxy, fault_proxy
from servers.moto import moto
from servers.rclone import rclone
from servers.seaweedfs import seaweedfs

from streamprep.storage import patience

PROVIDERS = ("AWS_", "GOOGLE_", "AZURE_", "AZURITE_", "HF_")

NewBucket = Callable[[Server], str]
Faulty = Callable[[Server], tuple[Mapping[str, str], FaultProxy]]


def read_hub_settings_anew() -> None:
    """huggingface_hub reads its environment once, when it is imported."""
    if "huggingface_hub" in sys.modules:
        importlib.reload(importlib.import_module("huggingface_hub.constants"))


on_seaweedfs = pytest.param("seaweedfs_server", id="seaweedfs", marks=[pytest.mark.s3, pytest.mark.slow])
on_azurite = pytest.param("azurite_server", id="azurite", marks=[pytest.mark.azurite, pytest.mark.slow])
on_moto = pytest.param("moto_server", id="moto")
on_fake_gs = pytest.param("fake_gs_server", id="fake_gs")
on_fake_hf = pytest.param("fake_hf_server", id="fake_hf", marks=pytest.mark.slow)


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """S3, the quick one. Any key is let in."""
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """S3, the real one."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """S3 that ignores the conditions of a put."""
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Azure's emulator."""
    program = find_azurite()
    if program is None:
        pytest.skip(f"no azurite-blob: npm install -g azurite, or {VARIABLE}=1 lets the tests install it")
    with azurite(tmp_path_factory.mktemp("azurite"), program) as server:
        yield server


@pytest.fixture(scope="session")
def fake_gs_server() -> Iterator[Server]:
    """A fake of Google's."""
    with fake_gs() as server:
        yield server


@pytest.fixture(scope="session")
def fake_hf_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A fake of the Hugging Face hub; a bucket of it is a dataset's repository."""
    with fake_hf(tmp_path_factory.mktemp("fake-hf")) as server:
        yield server


@pytest.fixture(params=[on_moto, on_seaweedfs])
def s3_server(request: pytest.FixtureRequest) -> Server:
    """Each S3 server that keeps to the conditions of a put."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=[on_moto, on_seaweedfs, on_azurite, on_fake_gs])
def any_server(request: pytest.FixtureRequest) -> Server:
    """Each server that can hold a job of many writers."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def point_at(tmp_path: Path) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """``point_at(env)``: until the test's end, this environment and no other of a cloud's, in child processes too."""
    with pytest.MonkeyPatch.context() as patch:

        def point(env: Mapping[str, str]) -> None:
            for name in [name for name in os.environ if name.startswith(PROVIDERS)]:
                patch.delenv(name)
            # The developer's own profiles would be looked at, too.
            for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
                patch.setenv(name, str(tmp_path / "no-such-file"))
            patch.setenv("HF_HOME", str(tmp_path / "hf"))
            for name, value in env.items():
                patch.setenv(name, value)
            read_hub_settings_anew()

        yield point
    read_hub_settings_anew()


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits before a request is made again take no time here, but are counted as if they did; how long each was."""
    waits: list[float] = []
    monkeypatch.setattr(patience, "_now", lambda: time.monotonic() + sum(waits))
    monkeypatch.setattr(patience, "_pause", lambda seconds: waits.append(seconds) or True)
    return waits


@pytest.fixture
def new_bucket(point_at: Callable[[Mapping[str, str]], None]) -> NewBucket:
    """``new_bucket(server)``: the URL of an empty bucket; the environment is set to its server."""

    def make(server: Server) -> str:
        point_at(server.env)
        return server.new_bucket()

    return make


@pytest.fixture
def faulty(point_at: Callable[[Mapping[str, str]], None]) -> Iterator[Faulty]:
    """``env, proxy = faulty(server)``: a proxy before the server, and the environment is set to go through it.

    A bucket comes first: ``url = new_bucket(server)`` sets the environment to the server itself.
    """
    with ExitStack() as open_proxies:

        def stand_before(server: Server) -> tuple[Mapping[str, str], FaultProxy]:
            proxy = open_proxies.enter_context(fault_proxy(server.url))
            env = server.behind(proxy.url).env
            point_at(env)
            return env, proxy

        yield stand_before

"""Azurite, Azure's own emulator of its blob storage. It is an npm package, so it is not everywhere.

It is taken from ``PATH`` or from the folder where an earlier session installed it. Where there is none,
``STREAMPREP_TEST_INSTALL_AZURITE=1`` allows to install it there: npm brings about 370 MB.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

from servers import Server
from servers.processes import answers, running

VARIABLE = "STREAMPREP_TEST_INSTALL_AZURITE"
PACKAGE = "azurite@3.37.0"
INSTALL_SECONDS = 300
PROGRAM = "azurite-blob"
# Known to everybody: https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextmanager
def azurite(folder: Path, program: str) -> Iterator[Server]:
    """Run the program that `find_azurite` found; log and blobs go to ``folder``, the blobs are removed at the end."""
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as data:
        with running(
            lambda ports: [
                *[program, "--blobHost", "127.0.0.1", "--blobPort", str(ports[0]), "--location", data],
                *["--silent", "--skipApiVersionCheck", "--disableTelemetry"],
            ],
            num_ports=1,
            log=folder / "azurite.log",
            is_ready=lambda ports: answers(ports[0]),
        ) as [port]:
            url = f"http://127.0.0.1:{port}"
            env = {
                "AZURE_STORAGE_USE_EMULATOR": "true",
                "AZURITE_BLOB_STORAGE_URL": url,
                "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            }
            yield Server(name="azurite", url=url, root="az://", env=env, create_bucket=_container_maker(url))


def find_azurite() -> str | None:
    """The program, or None where it is not installed and may not be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "streamprep-tests" / PACKAGE
    installed = cache / "node_modules" / ".bin" / PROGRAM
    if not installed.exists() and os.environ.get(VARIABLE) == "1":
        _install(cache)
    return str(installed) if installed.exists() else shutil.which(PROGRAM)


def _install(cache: Path) -> None:
    """Install into a folder beside, then rename: a half is never taken for a whole."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache.parent, ignore_cleanup_errors=True) as half:
        command = ["npm", "install", "--prefix", half, "--no-audit", "--no-fund", "--ignore-scripts", PACKAGE]
        subprocess.run(command, check=True, timeout=INSTALL_SECONDS, stdout=subprocess.DEVNULL)
        if not cache.exists():  # another session may have been quicker
            Path(half).rename(cache)


def _container_maker(url: str) -> Callable[[str], None]:
    def create(name: str) -> None:
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        signed = [
            "PUT",
            *[""] * 11,  # none of the headers that are signed by their place
            *[f"{header}:{value}" for header, value in headers.items()],
            f"/{ACCOUNT}/{ACCOUNT}/{name}",
            "restype:container",
        ]
        digest = hmac.digest(base64.b64decode(KEY), "\n".join(signed).encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        request = Request(f"{url}/{ACCOUNT}/{name}?restype=container", method="PUT", headers=headers)
        urlopen(request, timeout=30).close()

    return create

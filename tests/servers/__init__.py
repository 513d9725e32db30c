"""Object stores on this machine, for tests: real ones, fakes that say so, and a proxy that makes any of them fail.

=================  ===============================================================================
``moto``           S3, in seconds; conditional puts, but any key is accepted
``seaweedfs``      S3, a real store: conditional puts, signatures; 3 s to start, about 1 GB of memory
``rclone``         S3 that ignores the conditions of a put: the store that must be refused
``azurite``        Azure's own emulator of its blob storage; from npm, so not everywhere
``fake_gs``        a fake of Google's XML API
``fake_hf``        a fake of the Hugging Face hub, which takes commits
``http_files``     plain files of a folder over HTTP, with ranges
``fault_proxy``    stands between a client and any of these, and makes requests fail as told
=================  ===============================================================================

Each module has one context manager, which gives a `Server` on free ports of 127.0.0.1. `object_stores.py` beside this
package makes fixtures of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from uuid import uuid4


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A store that runs, and what a client must know of it."""

    name: str
    url: str
    """Its endpoint, without a slash at the end."""
    root: str
    """What the URLs of its buckets begin with: ``s3://``, ``gs://``, ``az://``, ``hf://datasets/fake/``."""
    env: Mapping[str, str]
    """The environment variables by which a client finds it and is let in."""
    create_bucket: Callable[[str], None]

    def new_bucket(self) -> str:
        """Make an empty bucket and give its URL."""
        name = f"test-{uuid4().hex[:12]}"
        self.create_bucket(name)
        return f"{self.root}{name}"

    def behind(self, proxy_url: str) -> Server:
        """The same server, as who must go through a proxy sees it."""
        env = {name: value.replace(self.url, proxy_url) for name, value in self.env.items()}
        return replace(self, url=proxy_url, env=env)

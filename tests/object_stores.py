"""Fixtures of object stores: servers that run for the whole session, buckets for one test, and faults in between.

A test module says ``pytest_plugins = ["object_stores"]``. Tests that need SeaweedFS or Azurite are marked ``s3`` and
``azurite`` by their fixtures' use; `pytest -m "not s3"` leaves them out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from servers import Server
from servers.fault_proxy import FaultProxy, fault_proxy
from servers.moto import moto
from servers.rclone import rclone
from servers.seaweedfs import seaweedfs

MARKS = {"seaweedfs_server": "s3", "azurite_server": "azurite"}
PROVIDERS = ("AWS_", "GOOGLE_", "AZURE_")

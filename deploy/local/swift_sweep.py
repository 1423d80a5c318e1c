"""Owns what the embedded store keeps of a deleted object: a folder with a tombstone, and a row in its container's list.

They are for replicas that have not heard of the deletion. Elsewhere Swift's replicators remove them after a week; here
are no replicas, and nobody else does.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import eventlet
from eventlet import tpool
from swift.container.backend import ContainerBroker
from swift.obj.diskfile import DiskFileManager

_FIRST_SECONDS = 600  # after the start, when others are busy
_EVERY_SECONDS = 24 * 3600
_KEPT_SECONDS = 7 * 24 * 3600  # Swift's own reclaim_age


def sweep_for_ever(node: Path) -> None:
    """Sweeps once a day."""
    eventlet.sleep(_FIRST_SECONDS)
    while True:
        try:
            sweep(node)
        except (Exception, eventlet.Timeout) as error:  # Swift's own come from either
            print(f"what is left of deleted objects stays until tomorrow: {error}", file=sys.stderr, flush=True)
        eventlet.sleep(_EVERY_SECONDS)


def sweep(node: Path, kept_seconds: int = _KEPT_SECONDS) -> None:
    """Removes what is left of objects that were deleted so long ago. Requests are answered meanwhile."""
    manager = DiskFileManager({"devices": str(node), "reclaim_age": kept_seconds}, logging.getLogger())
    for suffix in node.glob("d1/objects/*/*/"):
        tpool.execute(_sweep_folders, manager, suffix)
    for database in node.glob("d1/containers/*/*/*/*.db"):
        ContainerBroker(str(database)).reclaim(time.time() - kept_seconds, 0)
        eventlet.sleep()


def _sweep_folders(manager: DiskFileManager, suffix: Path) -> None:
    """Looks into the folder of each object. Those with an object in them stay as they are."""
    for folder in suffix.iterdir():
        manager.cleanup_ondisk_files(str(folder))

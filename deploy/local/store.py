"""Owns how the launcher runs and readies the object store (deploy.local.swift is a process of its own)."""

import os
import signal
import socket
import sys
import time
from typing import Any

from deploy.local.home import S3_ACCESS_KEY, S3_REGION, Home
from services.common.process import bound


class Store:
    """The embedded object store of one ESD_HOME on one loopback port."""

    def __init__(self, home: Home, port: int) -> None:
        self._home = home
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def command(self) -> list[str]:
        """Returns the command that serves the store in the foreground and dies with us."""
        return bound([sys.executable, "-m", "deploy.local.swift"], signum=signal.SIGKILL)

    def environment(self) -> dict[str, str]:
        """Returns the settings of that process."""
        return {
            "ESD_LISTEN": f"127.0.0.1:{self.port}",
            "ESD_SWIFT_DIR": str(self._home.swift),
            "ESD_S3_ACCESS_KEY": S3_ACCESS_KEY,
            "ESD_S3_SECRET_KEY_FILE": str(self._home.s3_secret_key_file),
            "ESD_S3_REGION": S3_REGION,
            "ESD_SWIFT_RESERVE": reserve(),
            # Swift brings a library whose import warns; its warnings are not for our log.
            "PYTHONWARNINGS": "ignore",
        }

    def client(self, endpoint_url: str | None = None) -> Any:
        """Returns a boto3 S3 client; with `endpoint_url`, one whose presigned URLs are for that host."""
        import boto3  # 40 MB that the launcher does not need
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=endpoint_url or self.url,
            region_name=S3_REGION,
            aws_access_key_id=S3_ACCESS_KEY,
            aws_secret_access_key=self._home.s3_secret_key,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )

    def wait_until_up(self, seconds: float = 30) -> None:
        """Returns when the store accepts connections. Raises TimeoutError after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError as error:
                if time.monotonic() > end:
                    raise TimeoutError(f"the object store does not answer after {seconds:.0f} s") from error
                time.sleep(0.05)  # a server that does not listen yet sends no event
            else:
                return

    def bootstrap(self, bucket: str) -> None:
        """Makes the bucket if there is none."""
        client = self.client()
        if bucket not in {entry["Name"] for entry in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=bucket)


def reserve() -> str:
    """What the store leaves free of its disk: bytes, or a percentage."""
    return os.environ.get("ESD_SWIFT_RESERVE") or "2%"


def reserved_bytes(reserve: str, disk_bytes: int) -> float:
    """A reserve of a disk of this size; one that the store refuses is none."""
    try:
        return float(reserve[:-1]) / 100 * disk_bytes if reserve.endswith("%") else float(reserve)
    except ValueError:
        return 0

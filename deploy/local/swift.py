"""Owns the embedded object store: OpenStack Swift with its S3 API, all four servers in one process of its own.

    ESD_LISTEN=127.0.0.1:PORT ESD_SWIFT_DIR=... ESD_S3_SECRET_KEY_FILE=... python -m deploy.local.swift

The proxy listens on ESD_LISTEN and checks signatures. The object, container and account servers know no authentication,
so they listen on Unix sockets in a folder that only this user can enter; the ring's addresses are mere names for them.

ESD_SWIFT_RESERVE is what uploads leave free of the disk, on which PostgreSQL may write too: bytes, or a percentage of
the disk (2%). An upload that would need more is refused with 503; objects can be read and deleted.

This file is only ever run: eventlet patches the whole process, so nothing of ours may import it.
"""

import errno
import logging
import os
import re
import secrets
from pathlib import Path
from typing import Any

import eventlet

logging.disable()  # the patch logs a traceback for an object of a library's that it cannot look into, and goes on
eventlet.monkey_patch()
logging.disable(logging.NOTSET)

import socket  # noqa: E402 - after the patch, like everything that uses threads or sockets

from eventlet import wsgi  # noqa: E402
from swift.common import bufferedhttp, utils  # noqa: E402
from swift.common import wsgi as swift_wsgi  # noqa: E402
from swift.common.middleware.s3api.controllers import multi_upload  # noqa: E402
from swift.common.middleware.s3api.s3response import NoSuchUpload  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.utils import set_swift_dir  # noqa: E402

from deploy.local.files import write_durably  # noqa: E402
from deploy.local.store import reserve  # noqa: E402
from deploy.local.swift_sweep import sweep_for_ever  # noqa: E402
from services.common.process import refuse  # noqa: E402

# The ring wants an address per server; these "ports" are names that connect() below maps to sockets.
_INTERNAL = {"object": 6200, "container": 6201, "account": 6202}
_BACKLOG = 512
_UNUSABLE = re.compile(r"#|%\(|%[0-9a-fA-F]{2}")  # in paths: PasteDeploy takes them for something else
_REQUESTS_AT_ONCE = 1024

_SERVER_CONF = """\
[DEFAULT]
swift_dir = {etc}
devices = {node}
mount_check = false
log_level = ERROR
fallocate_reserve = {reserve}
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
conn_timeout = {patience}
node_timeout = {patience}
"""

# Of the servers with each other, in seconds. They share one process: who does not answer is busy, not broken, and there
# is no other to ask. By default ten answers that come late, or one upload that the disk has no room for, make the proxy
# refuse everything for a minute: errors must not be remembered.
_PATIENCE = 60
_MAX_PARTS = 10_000  # of an upload, as on AWS; Swift's own 1,000 end an import of 100 GB at its twelfth
# Swift leaves what it does later to daemons that do not run here. So parts of an object go with it (`slo`), and what is
# left of deleted ones is swept away (swift_sweep.py).
_PROXY_CONF = """\
[DEFAULT]
swift_dir = {etc}
log_level = ERROR
cors_allow_origin = *
cors_expose_headers = etag
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats s3api tempauth copy slo dlo versioned_writes symlink \
proxy-server
[app:proxy-server]
use = egg:swift#proxy
expose_info = false
conn_timeout = {patience}
node_timeout = {patience}
recoverable_node_timeout = {patience}
error_suppression_interval = 0
allow_account_management = true
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:cache]
paste.filter_factory = deploy.local.swift_cache:filter_factory
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
max_manifest_segments = {parts}
allow_async_delete = false
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
[filter:s3api]
use = egg:swift#s3api
max_upload_part_num = {parts}
location = {region}
check_bucket_owner = false
cors_preflight_allow_origin = *
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{user} = {secret} .admin
"""


def main() -> None:
    """Serves until it is killed; writes are durable, so that needs no farewell."""
    host, _, port = _setting("ESD_LISTEN").rpartition(":")
    root = Path(_setting("ESD_SWIFT_DIR")).resolve()
    if _UNUSABLE.search(str(root)):
        refuse(f"the object store cannot be in {root}: its path may have no #, no %( and no %20 or the like")
    _check_xattrs(root)
    etc = _configure(root)
    set_swift_dir(str(etc))
    # What Swift's own way of starting does with fallocate_reserve, for objects whose size is known.
    try:
        utils.FALLOCATE_RESERVE, utils.FALLOCATE_IS_PERCENT = utils.config_fallocate_value(reserve())
    except ValueError:
        refuse(f"setting ESD_SWIFT_RESERVE: bytes, or a percentage such as 2%, are wanted (given: {reserve()!r})")
    logging.disable(logging.INFO)

    # Relative socket names, because a socket's path ends at 107 bytes and the folder may be anywhere.
    sockets = root / "sockets"
    sockets.mkdir(mode=0o700, exist_ok=True)
    os.chdir(sockets)
    _connect_through_sockets()
    _refuse_parts_after_the_end()
    eventlet.spawn(sweep_for_ever, root / "node")
    for kind in _INTERNAL:
        Path(f"{kind}.sock").unlink(missing_ok=True)
        listener = eventlet.listen(f"{kind}.sock", family=socket.AF_UNIX, backlog=_BACKLOG)
        eventlet.spawn(_serve, listener, etc / f"{kind}-server.conf")
    listener = eventlet.listen((host.strip("[]"), int(port)), backlog=_BACKLOG)
    _serve(listener, etc / "proxy-server.conf")


def _serve(listener: Any, conf: Path) -> None:
    app = swift_wsgi.loadapp(str(conf), global_conf={"log_name": conf.stem})
    wsgi.server(
        listener,
        app,
        log_output=False,
        custom_pool=eventlet.GreenPool(_REQUESTS_AT_ONCE),
        protocol=swift_wsgi.SwiftHttpProtocol,
        debug=False,
        socket_timeout=60,
        capitalize_response_headers=False,  # else metadata keys change case
    )


def _connect_through_sockets() -> None:
    """Makes Swift's internal connections go to the sockets in the working directory."""
    names = {port: f"{kind}.sock" for kind, port in _INTERNAL.items()}

    def connect(connection: Any) -> None:
        connection._connected_time = 0.0  # read by a debug message
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(names[connection.port])

    bufferedhttp.BufferedHTTPConnection.connect = connect


def _refuse_parts_after_the_end() -> None:
    """A complete upload takes no more parts, as on AWS. Swift would write over those that the object is made of."""
    find = multi_upload._get_upload_info

    def find_open(request: Any, app: Any, upload_id: str) -> tuple[Any, bool]:
        found, is_open = find(request, app, upload_id)
        if request.method == "PUT" and not is_open:
            raise NoSuchUpload(upload_id=upload_id)
        return found, is_open

    multi_upload._get_upload_info = find_open


def _configure(root: Path) -> Path:
    """Writes the configuration anew, except what data depends on: the hash suffix and the rings. Returns its folder."""
    etc, node = root / "etc", root / "node"
    etc.mkdir(mode=0o700, exist_ok=True)
    (node / "d1").mkdir(parents=True, exist_ok=True)
    suffix_file = etc / "swift.conf"
    if not suffix_file.exists():
        suffix = secrets.token_hex(16)
        policy = "[storage-policy:0]\nname = one\ndefault = yes\n"
        write_durably(suffix_file, f"[swift-hash]\nswift_hash_path_suffix = {suffix}\n{policy}")
    elif not suffix_file.stat().st_size:
        refuse(f"{suffix_file} is empty: put a copy of it back; without it no object is found")
    for kind, port in _INTERNAL.items():
        ring = etc / f"{kind}.ring.gz"
        if not ring.exists():
            _make_ring(ring, port)
        kept = reserve() if kind == "object" else "0"  # the lists of objects are small, and are needed to delete
        conf = _SERVER_CONF.format(etc=etc, node=node, kind=kind, patience=_PATIENCE, reserve=kept)
        write_durably(etc / f"{kind}-server.conf", conf)
    account, _, user = _setting("ESD_S3_ACCESS_KEY").partition(":")
    secret = Path(_setting("ESD_S3_SECRET_KEY_FILE")).read_text().strip()
    region = os.environ.get("ESD_S3_REGION", "us-east-1")
    limits = {"patience": _PATIENCE, "parts": _MAX_PARTS}
    proxy = _PROXY_CONF.format(etc=etc, account=account, user=user, secret=secret, region=region, **limits)
    write_durably(etc / "proxy-server.conf", proxy)
    return etc


def _make_ring(file: Path, port: int) -> None:
    builder = RingBuilder(part_power=6, replicas=1, min_part_hours=0)
    address = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "device": "d1", "weight": 1.0, "meta": "", **address})
    builder.rebalance()
    builder.get_ring().save(str(file))  # synced and renamed by Swift


def _check_xattrs(root: Path) -> None:
    """Swift keeps metadata in extended attributes; exits with a sentence where the file system has none."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    probe = root / ".xattr-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.metadata", b"x" * 1024)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        refuse(
            f"the file system of ESD_HOME ({root}) keeps no extended attributes ({error.strerror}), which the object "
            "store needs: put ESD_HOME on a local disk with ext4, xfs or btrfs, not on NFS"
        )
    finally:
        probe.unlink()


def _setting(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        refuse(f"{name} is not set")
    return value


if __name__ == "__main__":
    main()

"""Owns the two steps of a start that are programs of their own, so that their libraries do not stay in the launcher:

bootstrap   waits for PostgreSQL and the object store, makes roles, databases and the bucket
ready       waits until the five services say SERVING and the gateway answers GET /ping
"""

from __future__ import annotations

import asyncio
import os
import sys

from deploy.local.home import S3_BUCKET, SERVICES, Home, default_home
from services.common.process import refuse

_RETRY_SECONDS = 0.1  # a server that is not there yet sends no event


def bootstrap(home: Home) -> None:
    """Makes what the services expect; does nothing where it is."""
    from deploy.local.postgres import PasswordRefusedError, Postgres  # each step loads only what it needs
    from deploy.local.store import Store

    postgres = Postgres(home, int(os.environ["ESD_POSTGRES_PORT"]))
    try:
        postgres.wait_until_up()
    except PasswordRefusedError as error:
        refuse(str(error))
    postgres.bootstrap(SERVICES)
    store = Store(home, int(os.environ["ESD_SWIFT_PORT"]))
    store.wait_until_up()
    store.bootstrap(S3_BUCKET)


async def ready(home: Home) -> None:
    """Returns when everything answers. Says what of it is of no use: a first key that was revoked, and a gateway
    with TLS that workers of this machine cannot reach.
    """
    from deploy.local.health import distrust, gateway_opens, serving

    waiting = [address for name in SERVICES for address in os.environ[f"ESD_{name.upper()}_ADDRESS"].split(",")]
    while waiting:
        answers = await asyncio.gather(*(serving(address) for address in waiting))
        waiting = [address for address, up in zip(waiting, answers, strict=True) if not up]
        if waiting:
            await asyncio.sleep(_RETRY_SECONDS)
    while (opens := await gateway_opens(os.environ["ESD_PROBE_URL"], home.api_key)) is None:  # noqa: ASYNC110
        await asyncio.sleep(_RETRY_SECONDS)
    if not opens:
        print(
            f"the first API key, in {home.api_key_file}, was revoked: use another one, or remove the file, and "
            "the next start makes a new first key",
            file=sys.stderr,
        )
    url = os.environ["ESD_PUBLIC_URL"]
    if url.startswith("https:") and (reason := distrust(url, home.trust_file)):
        print(
            f"workers of this machine cannot reach the gateway at {url}: {reason}; set ESD_PUBLIC_URL to its address "
            "by a name that is in the certificate (ESD_TLS_CERT_FILE)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    _home = Home(default_home())
    if sys.argv[1:] == ["bootstrap"]:
        bootstrap(_home)
    else:
        asyncio.run(ready(_home))

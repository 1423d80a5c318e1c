"""`python -m deploy.kubernetes.bucket`: makes the bucket of ESD_S3_BUCKET if there is none, then ends.

For the object store of a trial. A store that is not there yet is a failure; whoever started this starts it again.
"""

from __future__ import annotations

import sys

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from services.common.settings import BlobSettings, load, read_secret


def make_bucket(settings: BlobSettings) -> None:
    """Makes the bucket; does nothing where it is.

    Raises:
        BotoCoreError, ClientError: the store does not answer, or refuses.
    """
    client = boto3.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=read_secret(settings.secret_key_file) if settings.secret_key_file else None,
        config=Config(s3={"addressing_style": "path"}, connect_timeout=5, retries={"total_max_attempts": 1}),
    )
    if settings.bucket not in {entry["Name"] for entry in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=settings.bucket)


if __name__ == "__main__":
    _settings = load(BlobSettings)
    try:
        make_bucket(_settings)
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"the bucket {_settings.bucket} cannot be made: {error}")

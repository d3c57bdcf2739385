"""A real S3 server whose buckets lock, and somebody who has the pool's credentials and means harm.

bucket = make_bucket(server, "governance", days=1)
attack = Attack(bucket)
attack.destroy()                  # each version, by its id, also against governance
attack.delete()                   # plain deletes, as of any S3 tool
attack.overwrite()
"""

import contextlib
import itertools
from typing import Any
from urllib.parse import urlsplit

import pytest

from support.s3 import Server

_numbers = itertools.count()


def client_of(server: Server) -> Any:
    """Return the vendor's own client, with the rights that the pool has."""
    session = pytest.importorskip("botocore.session").get_session()
    options = server.options
    return session.create_client(
        "s3",
        endpoint_url=options["endpoint"],
        region_name=options["region"],
        aws_access_key_id=options["access_key_id"],
        aws_secret_access_key=options["secret_access_key"],
    )


def make_bucket(server: Server, mode: str = "", days: int = 0) -> str:
    """Make a bucket with object lock, and a default retention when a mode is given."""
    client, name = client_of(server), f"lock{next(_numbers)}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    if mode:
        rule = {"DefaultRetention": {"Mode": mode.upper(), "Days": days}}
        client.put_object_lock_configuration(
            Bucket=name,
            ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule},
        )
    return name


class Attack:
    """What can be done to the objects of a pool, by its URL."""

    def __init__(self, server: Server, url: str) -> None:
        self.client = client_of(server)
        parts = urlsplit(url)
        self._at = {"Bucket": parts.netloc, "Prefix": parts.path.strip("/") + "/"}

    def versions(self) -> list[dict[str, Any]]:
        """Return all versions of all objects."""
        pages = self.client.get_paginator("list_object_versions").paginate(**self._at)
        return [one for page in pages for one in page.get("Versions", [])]

    def seen(self) -> list[str]:
        """Return the keys of all objects that are seen."""
        pages = self.client.get_paginator("list_objects_v2").paginate(**self._at)
        return [one["Key"] for page in pages for one in page.get("Contents", [])]

    def destroy(self, *, bypass: bool = True, spare: str = "nothing") -> None:
        """Delete for good whatever is not kept from it, but keys that end with `spare`."""
        from botocore.exceptions import ClientError

        for one in self.versions():
            if one["Key"].endswith(spare):
                continue
            with contextlib.suppress(ClientError):
                self.client.delete_object(
                    Bucket=self._at["Bucket"],
                    Key=one["Key"],
                    VersionId=one["VersionId"],
                    BypassGovernanceRetention=bypass,
                )

    def delete(self) -> None:
        """Delete all objects."""
        for key in self.seen():
            self.client.delete_object(Bucket=self._at["Bucket"], Key=key)

    def overwrite(self) -> None:
        """Replace all objects."""
        for key in self.seen():
            self.client.put_object(Bucket=self._at["Bucket"], Key=key, Body=b"pay to get it back")

    def locks(self) -> dict[str, tuple[str, Any] | None]:
        """Return mode and end of the lock of each object's newest version."""
        found: dict[str, tuple[str, Any] | None] = {}
        for key in self.seen():
            told = self.client.head_object(Bucket=self._at["Bucket"], Key=key)
            mode = told.get("ObjectLockMode")
            found[key] = (mode, told["ObjectLockRetainUntilDate"]) if mode else None
        return found

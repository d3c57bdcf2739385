"""A log in an object store, without any server of its own.

    log = BucketLog(open_store("s3://bucket/pool"), "log")

- `format`: the bytes of its objects
- `draft`: what one swap makes of the head
- `engine`: appending, reading, waiting, trimming
- `archive`: what is sealed
- `turns`: who of several writers goes next
"""

from everpool.log.bucket.engine import BucketLog

__all__ = ["BucketLog"]

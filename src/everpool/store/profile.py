"""Profiles of the AWS tools: what `~/.aws/credentials` and `~/.aws/config` say under a name."""

import configparser
import os
from pathlib import Path

from everpool.errors import InvalidError

_NAMES = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}


def aws_profile(name: str, *, required: bool) -> dict[str, str]:
    """Return the options that the profile gives, named as obstore does.

    Raises `InvalidError` when it is `required` and has no keys of its own, as those of single
    sign-on and of assumed roles.
    """
    home = Path.home() / ".aws"
    credentials = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"))
    config = Path(os.environ.get("AWS_CONFIG_FILE", home / "config"))
    section = name if name == "default" else f"profile {name}"
    found = _read(config, section) | _read(credentials, name)
    if required and not {"access_key_id", "secret_access_key"} <= set(found):
        raise InvalidError(
            f"the AWS profile {name!r} has no keys in {credentials} or {config}: add them, or run"
            f' eval "$(aws configure export-credentials --profile {name} --format env)"'
        )
    return found


def _read(path: Path, section: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, default_section="", strict=False)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError, OSError) as error:
        # The error's own message may quote a line of the file.
        raise InvalidError(f"{path} cannot be read ({type(error).__name__})") from None
    if not parser.has_section(section):
        return {}
    return {_NAMES[key]: value for key, value in parser.items(section) if key in _NAMES}

from collections.abc import Callable
from typing import Any

env_keys: Callable[[Any, bool], tuple[Any, ...]]

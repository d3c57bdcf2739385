from typing import Any, Callable

env_keys: Callable[[Any, bool], tuple[Any, ...]]

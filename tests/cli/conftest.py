"""The repository folder of the registry's tests, for commands."""

from tests.registry.conftest import quiet_store, root  # noqa: F401

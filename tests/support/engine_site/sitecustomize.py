"""Installs the shims in every Python that is started with this folder on its path."""

import engine_shims

engine_shims.install()

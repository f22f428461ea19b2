"""Installs the shims in every Python process with this directory on its path."""

import engine_shims

engine_shims.install()

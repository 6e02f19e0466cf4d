"""Puts this folder on the path: `tolerance` is shared with the folders below."""

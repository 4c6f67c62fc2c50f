"""Shared by all tests. That this file exists puts `tests/` on the path, for `toy_tree`."""

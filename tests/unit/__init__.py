"""Tests of single modules, and of commands run in-process."""

import pytest

pytest.register_assert_rewrite("tests.faults", "tests.outcome", "tests.readers")  # a failed assert there says why

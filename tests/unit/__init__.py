"""Tests of single modules, and of commands run in-process."""

"""Tests that open a real browser."""

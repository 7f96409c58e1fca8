"""Tests of integrations with training loops of other libraries."""

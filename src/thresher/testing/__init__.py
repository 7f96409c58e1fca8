"""Checks of the contract of any mechanism, yours or ours: `check(MyMechanism)`."""

from thresher.testing.contract import CONTRACT, LEAKS, Check, Fault, check, find_faults

__all__ = ["CONTRACT", "LEAKS", "Check", "Fault", "check", "find_faults"]

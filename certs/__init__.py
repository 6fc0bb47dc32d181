"""The federation's PKI: a CA, what it signs, one key pair for each SuperNode; and their lives."""

from common.errors import CertsError

from .life import begin_rotation, expiring, finish_rotation, renew, switch_rotation
from .members import Revocation, enrol, revocations, revoke, revoked_names
from .store import Issued, Record, inspect, issue

__all__ = [
    "CertsError",
    "Issued",
    "Record",
    "Revocation",
    "begin_rotation",
    "enrol",
    "expiring",
    "finish_rotation",
    "inspect",
    "issue",
    "renew",
    "revocations",
    "revoke",
    "revoked_names",
    "switch_rotation",
]

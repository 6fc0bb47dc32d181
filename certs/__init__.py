"""The federation's PKI: a CA, the SuperLink's certificate, one key pair for each SuperNode."""

from .errors import CertsError
from .store import Issued, Record, inspect, issue

__all__ = ["CertsError", "Issued", "Record", "inspect", "issue"]

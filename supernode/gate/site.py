"""A hospital's site folder.

policy.toml     what may run and what may leave; the SuperNode only reads it
fabs/           the bytes of every approved FAB, SHA256.fab, to compare the next one with
audit/          the audit log; the SuperNode writes it, and may be told to do so elsewhere
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.errors import SuperNodeError
from common.files import PRIVATE, write_or_say

from .policy import FILE_NAME, Approval, approve, load


@dataclass(frozen=True)
class Site:
    """The folder and what is in it.

    Args:
        folder: where it is.
        audit: the audit log's folder.
    """

    folder: Path
    audit: Path

    @classmethod
    def at(cls, folder: Path, audit: Path | None = None) -> Site:
        """The site in ``folder``, with its audit log there too unless another place is given."""
        return cls(folder, audit or folder / "audit")

    @property
    def policy(self) -> Path:
        """What may run and what may leave."""
        return self.folder / FILE_NAME

    def approve(self, fab: bytes, by: str, note: str) -> Approval | None:
        """Approve a FAB from now on and keep its bytes; None if it was approved before.

        Raises:
            SuperNodeError: the policy has an error, or the folder cannot be written.
        """
        sha256 = hashlib.sha256(fab).hexdigest()
        approval = Approval(sha256, by, datetime.now(UTC).replace(microsecond=0), note)
        write_or_say(self._fab(sha256), fab, PRIVATE, error=SuperNodeError)
        return approval if approve(self.policy, approval) else None

    def last_approved(self) -> tuple[Approval, bytes] | None:
        """The newest approval whose FAB is still here, with the FAB; None if there is none.

        Raises:
            SuperNodeError: the policy has an error.
        """
        approvals = sorted(load(self.policy).approvals, key=lambda one: one.approved_at)
        for approval in reversed(approvals):
            path = self._fab(approval.sha256)
            if path.is_file():
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == approval.sha256:
                    return approval, content
        return None

    def _fab(self, sha256: str) -> Path:
        return self.folder / "fabs" / f"{sha256}.fab"

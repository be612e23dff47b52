"""Whether a set of images can be trusted: copies, patients on two sides, and shortcuts."""

from __future__ import annotations

from magsd.audit.report import AuditReport, audit_source

__all__ = ["AuditReport", "audit_source"]

"""Thresholds that turn findings into a verdict, and findings as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from metarec.data.checks import CODES
from metarec.data.checks.findings import DataFinding
from metarec.errors import ConfigError, shown, suggest
from metarec.files.artifacts import SCHEMA_VERSION


def read_threshold(text: str) -> tuple[str, float, bool]:
    """Reads ``CODE=LIMIT``: a number of rows (``markup=10``), or a share (``thin-user=5%``).

    Returns:
        The finding's code, the limit, and whether it is a share.

    Raises:
        ConfigError: The code is unknown, or the limit is no number.
    """
    code, equals, limit = text.partition("=")
    if code not in CODES and code not in ("error", "warning", "note"):
        raise ConfigError(
            f"--fail-on {shown(text)} names no finding", suggest(code, [*CODES, "error", "warning", "note"])
        )
    share = limit.endswith("%")
    number = limit.removesuffix("%") if equals else "0"
    if not re.fullmatch(r"\d+(\.\d+)?", number):
        raise ConfigError(f"--fail-on {shown(text)} has no limit", "Write e.g. markup=10 or thin-user=5%")
    return code, float(number) / (100 if share else 1), share


def broken(findings: Sequence[DataFinding], thresholds: Sequence[tuple[str, float, bool]]) -> list[str]:
    """Says which thresholds are broken: a finding beyond its limit, by code or by severity."""
    said = []
    for code, limit, share in thresholds:
        for finding in findings:
            value = finding.share if share else finding.count
            if code in (finding.code, finding.severity) and value > limit:
                shown = (f"{value:.2%}", f"{limit:.2%}") if share else (f"{finding.count}", f"{limit:g}")
                said.append(f"{finding.code}: {shown[0]}, more than {shown[1]}")
    return said


def to_json(
    findings: Sequence[DataFinding],
    done: Sequence[str] = (),
    verdict: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns findings as plain JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        **(facts or {}),
        "findings": [{**vars(finding), "rows": list(finding.rows), "share": finding.share} for finding in findings],
        "fixed": list(done),
        "broken_thresholds": list(verdict),
    }

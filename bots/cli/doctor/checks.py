"""The table of checks, and what they find, worst first."""

from bots.cli.doctor.configuration import bots, configuration
from bots.cli.doctor.findings import Check, Finding, Level, Setup
from bots.cli.doctor.machine import clock, python, sqlite, torch
from bots.cli.doctor.model import model, server
from bots.cli.doctor.storage import database, disk, home, key

CHECKS: tuple[Check, ...] = (
    configuration,
    bots,
    home,
    disk,
    key,
    database,
    model,
    server,
    torch,
    sqlite,
    python,
    clock,
)


def examine(setup: Setup) -> list[Finding]:
    """Run every check; the findings, worst first. A check that raises is a finding itself."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(setup)
        except Exception as error:  # a check that fails must not hide the others
            findings.append(setup.finding(Level.BAD, "check", "check_failed", check=check.__name__, error=str(error)))
    return sorted(findings, key=lambda finding: finding.level)

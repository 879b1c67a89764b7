"""What can go wrong in the harness, each with its message and its exit code.

| code | meaning |
| --- | --- |
| 0 | the cells asked for ran, whatever the verdict: ``not reproduced`` is a result |
| 2 | the command line asks for what does not exist: paper, claim, tier, study, device, option |
| 3 | the paper is in the catalogue, its claim is not built yet |
| 4 | the claim's own code fails: its module does not import, defines no claim, or ``judge`` raises |
| 5 | cells failed or are missing: no verdict; the same command tries them again |
| 6 | there is nothing to report yet |
| 7 | this evidence must not be recorded |
| 8 | a worker process, or Ray, did not start |
| 20 | the ledger is locked by another process |
| 21 | the ledger, or its folder, is read-only |
| 22 | the ledger is damaged, or is not a ledger |
| 23 | the ledger was written by a newer provenn |
| 24 | the disk that holds the ledger is full |
| 25 | the ledger's server does not answer, or refuses |
| 26 | the ledger's address is not understood, or its driver is not installed |
| 130 | interrupted; the same command continues |
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of ``provenn run`` and ``provenn report``; the module's table says what each means."""

    OK = 0
    USAGE = 2
    NOT_BUILT = 3
    CLAIM_BROKEN = 4
    INCOMPLETE = 5
    NOTHING_TO_REPORT = 6
    NOT_RECORDED = 7
    WORKER_START = 8
    LEDGER_LOCKED = 20
    LEDGER_READ_ONLY = 21
    LEDGER_CORRUPT = 22
    LEDGER_NEWER = 23
    LEDGER_FULL = 24
    LEDGER_UNREACHABLE = 25
    LEDGER_ADDRESS = 26
    INTERRUPTED = 130


class HarnessError(Exception):
    """Base of the harness's errors: the message is for the user, ``code`` for the shell."""

    code = ExitCode.INCOMPLETE


class UsageError(HarnessError):
    """The command asks for what does not exist."""

    code = ExitCode.USAGE


class NotBuiltError(HarnessError):
    """The paper's claim is not built yet."""

    code = ExitCode.NOT_BUILT


class ClaimBrokenError(HarnessError):
    """The claim's own code fails outside its cells."""

    code = ExitCode.CLAIM_BROKEN


class IncompleteError(HarnessError):
    """Cells are missing, so there is no verdict."""

    code = ExitCode.INCOMPLETE


class NothingToReportError(HarnessError):
    """No finished cells and no shipped results."""

    code = ExitCode.NOTHING_TO_REPORT


class NotRecordedError(HarnessError):
    """The evidence must not ship as a result."""

    code = ExitCode.NOT_RECORDED


class WorkerStartError(HarnessError):
    """A worker process, or Ray, did not start."""

    code = ExitCode.WORKER_START


class LedgerError(HarnessError):
    """Base of the ledger's errors."""


class LedgerLockedError(LedgerError):
    """Another process holds the ledger."""

    code = ExitCode.LEDGER_LOCKED


class LedgerReadOnlyError(LedgerError):
    """The ledger cannot be written."""

    code = ExitCode.LEDGER_READ_ONLY


class LedgerCorruptError(LedgerError):
    """The ledger's file is damaged, or holds something else."""

    code = ExitCode.LEDGER_CORRUPT


class LedgerNewerError(LedgerError):
    """A newer provenn wrote the ledger."""

    code = ExitCode.LEDGER_NEWER


class LedgerFullError(LedgerError):
    """No room left for the ledger."""

    code = ExitCode.LEDGER_FULL


class LedgerUnreachableError(LedgerError):
    """The ledger's server does not answer, or refuses."""

    code = ExitCode.LEDGER_UNREACHABLE


class LedgerAddressError(LedgerError):
    """The ledger's address is not understood, or its driver is not installed."""

    code = ExitCode.LEDGER_ADDRESS

"""What a check of a bundle found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "advice"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something in a bundle that its owner should change.

    Attributes:
        level: `error` for what the CI of MONAI's model zoo refuses and for what keeps the bundle
            from working; `advice` for what the zoo's reviewers and other tools ask for.
        where: file, or file and key, relative to the bundle; empty if `found` has it.
        found: what is there.
        expected: what should be there; empty if `found` has it.
        action: what to do; empty if `found` has it.
    """

    level: Level
    where: str = ""
    found: str
    expected: str = ""
    action: str = ""

    @property
    def text(self) -> str:
        """The finding as one line."""
        expected = f"expected {self.expected}" if self.expected else ""
        clauses = "; ".join(clause for clause in (self.found, expected, self.action) if clause)
        return f"{self.where}: {clauses}" if self.where else clauses


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The results of all checks of a bundle.

    Attributes:
        findings: name of each check that ran, in their order → what it found.
    """

    findings: Mapping[str, tuple[Finding, ...]]

    @property
    def errors(self) -> dict[str, str]:
        """Name of each check that failed → its errors as one text."""
        return self._texts("error")

    @property
    def advice(self) -> dict[str, str]:
        """Name of each check that has advice → the advice as one text."""
        return self._texts("advice")

    def _texts(self, level: Level) -> dict[str, str]:
        texts = {
            name: "; ".join(finding.text for finding in found if finding.level == level)
            for name, found in self.findings.items()
        }
        return {name: text for name, text in texts.items() if text}

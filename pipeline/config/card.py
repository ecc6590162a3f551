"""FIXME."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a reader should know of a bundle and no program needs: the part of metadata.json that is written by hand.

    Attributes:
        eval_metrics: name → mean over cases, as measured by the commands in the bundle's README; none where not measured.
        changelog: version → what changed; the last version is the bundle's.
    """

    name: str
    description: str
    task: str
    authors: str
    copyright: str
    intended_use: str
    data_source: str
    data_type: str
    references: tuple[str, ...]
    eval_metrics: dict[str, float]
    changelog: dict[str, str]

    def __post_init__(self) -> None:
        if not self.changelog:
            raise ConfigError("card.changelog: expected at least one version, got none")

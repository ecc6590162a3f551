"""The description of a bundle for people, from its card.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """The part of a bundle's metadata.json that is written by hand; no program depends on it.

    Attributes:
        name: title of the bundle.
        description: what the model segments, in one or two sentences.
        task: such as "Segmentation of brain structures".
        authors: of the bundle.
        copyright: holder and year.
        intended_use: what the model is meant for, and what it is not meant for.
        data_source: the data that the weights were trained on.
        data_type: the file format of these data.
        references: publications, one per item.
        eval_metrics: name → mean over cases, measured by the commands in the bundle's README; empty
            for a bundle that was not evaluated.
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

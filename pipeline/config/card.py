"""The card: the description of a bundle for its users (card.yaml)."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """The hand-written part of a bundle's metadata.json, which describes the bundle to its users.

    Attributes:
        name: title of the bundle.
        description: what the model segments, in one or two sentences.
        task: what the model is for, such as "Segmentation of brain structures".
        authors: authors of the bundle.
        copyright: copyright holder and year.
        intended_use: what the model is meant for, and what it is not meant for.
        data_source: data that the weights were trained on.
        data_type: file format of these data.
        references: publications, one per item.
        eval_metrics: metric → mean over cases, as measured by the commands in the bundle's README;
            empty if the bundle has not been evaluated.
        changelog: version → what changed in it; the last one is the bundle's present version.
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

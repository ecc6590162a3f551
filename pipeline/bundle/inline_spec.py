"""The wiring of a bundle with its spec inside, for files that leave the bundle's folder."""

from __future__ import annotations

from typing import Any

import yaml
from monai.bundle import ConfigParser

from pipeline.bundle.wiring import literal, template
from pipeline.config import RENAMED_SPEC_KEYS, BundlePaths, Spec, load_spec, parse_config
from pipeline.log import LOGGER


def parse_spec(text: str) -> Spec:
    """Return the spec in the text of a spec.yaml.

    Raises:
        ConfigError: a key or a value is wrong; the message holds its key.
    """
    content = yaml.safe_load(text)
    return parse_config(
        Spec, {RENAMED_SPEC_KEYS.get(key, key): value for key, value in content.items()}, "spec"
    )


def wiring_with_spec(paths: BundlePaths) -> dict[str, Any]:
    """Return volseg's wiring for inference with the spec of a bundle in place of the path to it.

    The second network of a cascade is left out, with a warning: a file holds one network.
    """
    wiring: dict[str, Any] = ConfigParser.load_config_file(template("inference.yaml"))
    text = paths.spec.read_text(encoding="utf-8")
    wiring["spec"] = {
        "_target_": "pipeline.parts.parse_spec",
        "_requires_": "@package_check",
        "text": literal(text),  # the parser would act on parts of the text
    }
    wiring["cascade"] = None
    if load_spec(paths.spec).cascade is not None:
        LOGGER.warning(
            "%s: the exported file holds the first network only; the labels of the cascade's box "
            "are coarser than those of the bundle",
            paths.folder,
        )
    return wiring

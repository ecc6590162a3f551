"""The check that specs and runs use for their values."""

from __future__ import annotations

from pipeline.errors import ConfigError


def require(holds: bool, key: str, expected: str, found: object) -> None:
    """Raise an error about a value of a configuration unless a condition holds.

    Args:
        holds: whether the value is valid.
        key: path of the value, such as `spec.overlap`.
        expected: description of the valid values, such as `a fraction, 0 ≤ overlap < 1`.
        found: the value.

    Raises:
        ConfigError: the condition does not hold; the message is, for example,
            `spec.overlap: expected a fraction, 0 ≤ overlap < 1, got 1.0`.
    """
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {found}")

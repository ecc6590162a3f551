"""Write a trained network into a bundle, in int8, as the second network of its cascade.

    python scripts/join_cascade.py BUNDLE TRAINED_BUNDLE

The spec of the trained network has to be that of the cascade.
"""

from __future__ import annotations

import sys

import click

from pipeline.config import BundlePaths, Spec, load_spec
from pipeline.networks import read_state, save_state


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False))
@click.argument("trained", type=click.Path(exists=True, file_okay=False))
def main(bundle: str, trained: str) -> None:
    """Copy the weights, if the two specs agree."""
    whole, source = BundlePaths(bundle), BundlePaths(trained)
    wanted, found = load_spec(whole.spec).cascade_spec, load_spec(source.spec)
    if wanted is None:
        sys.exit(f"{whole.spec}: expected a cascade, got none")
    differing = _differences(wanted, found)
    if differing:
        sys.exit(f"{source.spec}: differs from the cascade of {whole.spec} in {differing}")
    save_state(read_state(source.weights), whole.cascade_weights, int8=True)
    size = whole.cascade_weights.stat().st_size
    click.echo(f"{whole.cascade_weights}: {size / 2**20:.1f} MB")


def _differences(wanted: Spec, found: Spec) -> str:
    """Return the keys, of those that a network depends on, in which two specs differ."""
    keys = ("labels", "channels", "orientation", "spacing", "intensity", "roi_size", "network")
    return ", ".join(key for key in keys if getattr(wanted, key) != getattr(found, key))


if __name__ == "__main__":
    main()

"""The bundles that volseg ships, one folder per model; `pipeline.bundle.find_bundle` finds them."""

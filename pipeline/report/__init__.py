"""Pages for readers: what a bundle or a batch of cases gave."""

__all__: list[str] = []

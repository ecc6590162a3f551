"""Many images in several processes, with their results in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pipeline.batch.failures import WorkerDiedError, failure_text
from pipeline.batch.pool import Died, Finished, Pool, TimedOut
from pipeline.batch.runner import default_start_method, on_own_gpu
from pipeline.batch.stages import run_stages
from pipeline.errors import PipelineError, find_pipeline_error
from pipeline.inference import CaseModel, Prediction, PreparedCase

Result = Prediction | PipelineError


@dataclass(frozen=True, slots=True)
class _Item:
    """An image on its way to a worker."""

    name: int
    image: Any
    alone: bool = False


class _Images:
    """The images that are still to be given out."""

    def __init__(self, images: Iterable[Any]) -> None:
        self._images = enumerate(images)
        self._again: deque[_Item] = deque()
        self.exhausted = False

    def take(self, *, alone: bool) -> _Item | None:
        if self._again and alone:
            return self._again.popleft()
        number, image = next(self._images, (None, None))
        if number is None:
            self.exhausted = not self._again
            return None
        return _Item(number, image)

    def give_back(self, items: Iterable[_Item]) -> None:
        self._again += items
        self.exhausted = False


@dataclass
class _ImageWork:
    """What a worker process does with images."""

    model: CaseModel

    def start(self, number: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = on_own_gpu(self.model, number, torch.cuda.device_count())

    def run(
        self,
        items: Iterator[_Item],
        emit: Callable[[Hashable, Any], None],
        ready: Callable[[], None],
    ) -> None:
        concurrent = self.model.max_memory is None

        def read(item: _Item) -> tuple[_Item, PreparedCase | PipelineError | None]:
            return item, _attempt(lambda: self.model.prepare(item.image)) if concurrent else None

        def compute(pair: tuple[_Item, PreparedCase | PipelineError | None]) -> tuple[int, Result]:
            item, prepared = pair
            if isinstance(prepared, PipelineError):
                return item.name, prepared
            if prepared is None:
                return item.name, _attempt(lambda: self.model.predict_case(item.image))
            return item.name, _attempt(lambda: self.model.predict(prepared))

        def write(pair: tuple[int, Result]) -> None:
            emit(pair[0], pair)

        run_stages(items, read, compute, write, concurrent=concurrent, prepare=ready)


def predict_many(
    model: CaseModel, images: Iterable[Any], *, jobs: int
) -> Iterator[tuple[int, Result]]:
    """Yield the predictions of images as they come, in any order, with the number of the image.

    Args:
        model: an opened bundle.
        images: each is what `CaseModel.predict_case` takes.
        jobs: number of processes, which share the cores; 1 computes in this process.

    Yields:
        the number of the image from 0, and its prediction or the error that it failed with.
    """
    if jobs == 1:
        for number, image in enumerate(images):
            yield number, _attempt(partial(model.predict_case, image))
        return
    pool: Pool[_Item] = Pool(
        _ImageWork(model),
        jobs=jobs,
        threads=max(1, torch.get_num_threads() // jobs),
        start_method=default_start_method(model),
    )
    source, results = _Images(images), deque[tuple[int, Result]]()

    def on_event(event: Finished[Any] | Died[_Item] | TimedOut[_Item]) -> None:
        if isinstance(event, Finished):
            results.append(event.result)
        elif isinstance(event, Died) and len(event.items) > 1:
            source.give_back(replace(item, alone=True) for item in event.items)
        elif isinstance(event, Died):
            error = WorkerDiedError(f"the process that computed this image died: {event.why}")
            results.extend((item.name, error) for item in event.items)

    try:
        running = True
        while running:
            running = pool.step(source, on_event)
            while results:
                yield results.popleft()
    finally:
        pool.close(lambda event: None)


def _attempt(function: Callable[[], Any]) -> Any:
    """Return the result of a function, or the error that a user can read."""
    try:
        return function()
    except Exception as error:
        return find_pipeline_error(error) or PipelineError(failure_text(error))

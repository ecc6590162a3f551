# volseg with its bundles, PyTorch for CPUs and OpenVINO; it needs no network when it runs.
#   docker build --tag volseg:0.2.0 .
#   docker run --rm --network none --user "$(id -u):$(id -g)" \
#     --volume DATA:/data:ro --volume OUT:/out volseg:0.2.0 bids /data /out participant
FROM python:3.11-slim-bookworm AS build
# the versions of constraints.txt, without the libraries of CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY pipeline pipeline
COPY bundles bundles
RUN python -m venv /opt/volseg && \
    /opt/volseg/bin/pip install --no-cache-dir --constraint constraints.txt \
      --extra-index-url "$TORCH_INDEX" '.[dask]'

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="volseg" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/volseg /opt/volseg
RUN useradd --create-home --uid 1000 volseg
# A user given by --user has neither a name nor a home folder: caches go to /tmp. VOLSEG_CONTAINER
# is what dataset_description.json of BIDS derivatives says about the container.
ENV PATH=/opt/volseg/bin:$PATH \
    USER=volseg \
    VOLSEG_CACHE=/tmp/volseg-cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    VOLSEG_CONTAINER=docker:volseg:0.2.0
USER 1000
WORKDIR /tmp
ENTRYPOINT ["volseg"]
CMD ["--help"]

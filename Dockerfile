# syntax=docker/dockerfile:1
# Three images from one tree; see docs/docker.md.
#
#   cpu       compress, export and build engines ahead of time, no GPU       docker build --target cpu .
#   tensorrt  the same on NVIDIA's TensorRT image, engines for the GPU here  docker build --target tensorrt .
#   runtime   build, validate and run bundles; no PyTorch (the default)      docker build .
#
# Bases are pinned by tag; pin them by digest with --build-arg PYTHON_IMAGE=python:...@sha256:...
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:26.08-py3

# What an installation needs of the tree, once for all stages.
FROM ${PYTHON_IMAGE} AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY infoprune_export ./infoprune_export
COPY recipes ./recipes
COPY tools/install.sh tools/smoke.sh ./tools/

FROM ${PYTHON_IMAGE} AS cpu
# For torch without CUDA: --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels>
ARG PIP_EXTRA_INDEX_URL=
COPY --from=source /src /src
RUN EDITABLE=0 /src/tools/install.sh /opt/venv export,trt-rtx \
    && /src/tools/smoke.sh /opt/venv
RUN useradd --create-home --uid 1000 infoprune && mkdir /bundles && chown infoprune /bundles
ENV PATH=/opt/venv/bin:$PATH
USER infoprune
WORKDIR /bundles
ENTRYPOINT ["infoprune-export"]
CMD ["--help"]

FROM ${TENSORRT_IMAGE} AS tensorrt
ARG PIP_EXTRA_INDEX_URL=
COPY --from=source /src /src
# TensorRT comes with the image. NVIDIA's own pins would fight ours, so its constraints file is not used.
RUN PIP_CONSTRAINT= EDITABLE=0 VENV_OPTIONS=--system-site-packages /src/tools/install.sh /opt/venv export \
    && /src/tools/smoke.sh /opt/venv
RUN useradd --create-home infoprune && mkdir /bundles && chown infoprune /bundles
ENV PATH=/opt/venv/bin:$PATH
USER infoprune
WORKDIR /bundles
ENTRYPOINT ["infoprune-export"]
CMD ["--help"]

FROM ${PYTHON_IMAGE} AS runtime-install
ARG RUNTIME_EXTRAS=trt-rtx
COPY --from=source /src /src
RUN EDITABLE=0 /src/tools/install.sh /opt/venv "${RUNTIME_EXTRAS}"

FROM ${PYTHON_IMAGE} AS runtime
COPY --from=runtime-install /opt/venv /opt/venv
COPY tools/smoke.sh /opt/infoprune-export/smoke.sh
RUN /opt/infoprune-export/smoke.sh /opt/venv
RUN useradd --create-home --uid 1000 infoprune && mkdir /bundles && chown infoprune /bundles
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER infoprune
WORKDIR /bundles
HEALTHCHECK --interval=5m --timeout=30s CMD ["infoprune-export", "doctor"]
ENTRYPOINT ["infoprune-export"]
CMD ["--help"]

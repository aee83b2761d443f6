# syntax=docker/dockerfile:1
# The daemon with vLLM, for NVIDIA GPUs or for the CPU. docs/images.md says how to build and run it.
#
#   docker build -t vllm-bootstrap .                               vllm-bootstrap on ports 8000 and 8001, CUDA
#   docker build --target launcher -t launcher .                   bullpen serve on port 8001, CUDA
#   docker build --build-arg ENGINE=cpu -t vllm-bootstrap:cpu .    either of them on a CPU
#
# Bases are pinned by version. To pin one by its content, put the digest behind the tag, as in
# ubuntu:24.04@sha256:…; `docker buildx imagetools inspect ubuntu:24.04` prints it.

# cuda or cpu.
ARG ENGINE=cuda
# CUDA as in requirements/engine-cuda.txt. CUDA's libraries come with vLLM's wheels, so that a base needs none of them;
# kernels that vLLM compiles at first use need nvcc, which the tag 13.0.3-devel-ubuntu24.04 has.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04
ARG CPU_BASE_IMAGE=ubuntu:24.04

FROM ${BASE_IMAGE} AS base-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${CPU_BASE_IMAGE} AS base-cpu

# hadolint ignore=DL3006
FROM base-${ENGINE} AS daemon
ARG ENGINE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Bullpen" \
      org.opencontainers.image.description="Keeps vLLM warmed up and puts any model on your accelerators in seconds." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# RUN in bash, and a failure anywhere in a pipe is one.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/bullpen

COPY images/install-packages.sh images/add-user.sh images/
RUN images/install-packages.sh "${ENGINE}" && images/add-user.sh

# What takes long comes before the code, and is made anew only when a pin changes. Bullpen itself is installed by
# reference to this folder, and its code comes after.
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY scripts/setup.sh scripts/
COPY src/bullpen/__init__.py src/bullpen/
RUN ENGINE="${ENGINE}" PIP_NO_CACHE_DIR=1 scripts/setup.sh product

COPY src src
COPY images/finish.sh images/healthcheck.sh images/
RUN images/finish.sh

ENV PATH=/opt/bullpen/.venv/bin:${PATH} \
    BULLPEN_STATE_DIR=/var/lib/bullpen \
    HF_HOME=/home/bullpen/.cache/huggingface \
    PYTHONUNBUFFERED=1
VOLUME ["/var/lib/bullpen", "/home/bullpen/.cache/huggingface"]
# By number, so that Kubernetes can tell that it is not root.
USER 1000:1000
WORKDIR /home/bullpen
# The daemon ends its servers first, and then with exit code 0.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["/opt/bullpen/images/healthcheck.sh"]

FROM daemon AS launcher
# The launcher's servers are called by others in the cluster, each on its own port.
ENV BULLPEN_INSTANCE_HOST=0.0.0.0
EXPOSE 8001 8002
ENTRYPOINT ["/usr/bin/tini", "--", "bullpen", "serve"]

FROM daemon AS endpoint
EXPOSE 8000 8001
ENTRYPOINT ["/usr/bin/tini", "--", "vllm-bootstrap"]

# syntax=docker/dockerfile:1
# The Python client alone: `docker build -f images/client.Dockerfile -t bullpen-client .`
#
# To pin the base by its content, put the digest behind the tag, as in python:3.13-slim-trixie@sha256:…

ARG BASE_IMAGE=python:3.13-slim-trixie

FROM ${BASE_IMAGE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/bullpen
COPY LICENSE ./
COPY requirements/bullpen.txt requirements/
COPY packaging/client packaging/client
COPY src src
COPY images/install-client.sh images/
RUN images/install-client.sh /opt/client

FROM ${BASE_IMAGE} AS client
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Bullpen's client" \
      org.opencontainers.image.description="Python client of Bullpen: launches, inference, sleep and swap, batch jobs." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/bullpen
COPY images/install-packages.sh images/add-user.sh images/
RUN images/install-packages.sh client && images/add-user.sh
COPY --from=build /opt/client /opt/client
ENV PATH=/opt/client/bin:${PATH} \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/bullpen
# It runs a program of yours once and ends with it. It listens nowhere, so that there is nothing to ask, and its exit code says
# how it went.
HEALTHCHECK NONE
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python"]

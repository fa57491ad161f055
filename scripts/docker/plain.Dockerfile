# Megatron and megatron_laer on a plain Python image, for GPUs or, with TORCH_INDEX_URL, for CPUs.
# From the top of the repository, with BuildKit (Docker 23 and newer):
#
#   docker build --file scripts/docker/plain.Dockerfile --tag megatron_laer .
#
# IMAGE is an official image of Python, of Debian's kind. This tag moves with fixes of Debian and
# Python; a digest, python:3.13-slim@sha256:..., makes builds that repeat.
ARG IMAGE=python:3.13-slim

FROM ${IMAGE} AS wheel
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY configs configs
COPY megatron_laer megatron_laer
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${IMAGE}
# A pipeline fails with any of its commands.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Triton compiles a launcher for each of its kernels, and NCCL loads the InfiniBand libraries.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libibverbs1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/*
# As images with CUDA have it; without, enroot gives a container no GPUs.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# What the package needs, in a layer that changes of the source leave as it is. TORCH_INDEX_URL is an
# index to take torch from, such as one with builds for CPUs alone.
ARG TORCH_INDEX_URL=
RUN --mount=type=bind,source=pyproject.toml,target=/needs/pyproject.toml \
    --mount=type=bind,source=constraints.txt,target=/needs/constraints.txt \
    --mount=type=cache,target=/var/cache/pip \
    if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --cache-dir /var/cache/pip --no-deps --index-url "$TORCH_INDEX_URL" \
            "$(grep '^torch==' /needs/constraints.txt)"; \
    fi \
    && python3 -c 'import tomllib; \
        project = tomllib.load(open("/needs/pyproject.toml", "rb"))["project"]; \
        print(*project["dependencies"], sep="\n")' \
        >/tmp/needs.txt \
    && pip install --cache-dir /var/cache/pip --constraint /needs/constraints.txt --requirement /tmp/needs.txt \
    && rm /tmp/needs.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl
COPY pretrain_gpt.py /opt/megatron_laer/
# Training needs no rights of root. USER_ID is whose folders are mounted.
ARG USER_ID=1000
RUN useradd --no-log-init --non-unique --create-home --uid "$USER_ID" laer \
    && mkdir --parents /workspace \
    && chown laer /workspace
USER laer
WORKDIR /workspace
# Import torch and Megatron, so that what is missing or does not fit shows now; no GPU is needed.
RUN megatron-laer doctor \
    && megatron-laer flags tiny-moe \
    | xargs megatron-laer check-recipe -- --expert-model-parallel-size 8
CMD ["megatron-laer", "doctor"]

# Megatron and megatron_laer on a plain Python image, for GPUs or, with TORCH_INDEX_URL, for CPUs.
# From the top of the repository, with BuildKit (Docker 23 and newer):
#
#   docker build --file scripts/docker/plain.Dockerfile --tag megatron_laer .
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS wheel
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY configs configs
COPY megatron_laer megatron_laer
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON_VERSION}-slim
# A pipeline fails with any of its commands.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Triton compiles a launcher for each of its kernels, and NCCL loads the InfiniBand libraries.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libibverbs1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/*
# An index to take torch from, such as one with builds for CPUs alone.
ARG TORCH_INDEX_URL=
COPY constraints.txt pretrain_gpt.py /opt/megatron_laer/
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX_URL" \
            "$(grep '^torch==' /opt/megatron_laer/constraints.txt)"; \
    fi
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /opt/megatron_laer/constraints.txt /wheels/*.whl
# Imports torch and Megatron, so that what is missing shows now; no GPU is needed.
RUN megatron-laer flags tiny-moe \
    | xargs megatron-laer check-recipe -- --expert-model-parallel-size 8
WORKDIR /workspace
CMD ["megatron-laer", "doctor"]

# Megatron and megatron_laer on NGC's PyTorch image, which has torch, Transformer Engine, NCCL and the
# InfiniBand libraries, built for each other. IMAGE is its address, with a tag, as the catalog has it
# (https://catalog.ngc.nvidia.com/orgs/nvidia/containers/pytorch); the image needs Python 3.12 and
# torch 2.8 or newer, as 25.12-py3 has them. From the top of the repository, with BuildKit (Docker 23
# and newer):
#
#   docker build --file scripts/docker/ngc.Dockerfile --build-arg IMAGE=ADDRESS:25.12-py3 \
#       --tag megatron_laer:ngc .
ARG IMAGE

FROM ${IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY configs configs
COPY megatron_laer megatron_laer
# The image's constraints are of what runs in it; what builds is in an environment of its own.
RUN env --unset=PIP_CONSTRAINT pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${IMAGE}
# A pipeline fails with any of its commands.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The image holds every package at the version that it was built with, also a `packaging` that is too
# old for Megatron. Its release notes say to take such a line out.
RUN if [ -f /etc/pip/constraint.txt ]; then \
        sed --in-place '/^packaging\b/d' /etc/pip/constraint.txt; \
    fi
# What the package needs, in a layer that changes of the source leave as it is. The image's own torch
# stays: its version is a constraint, also where the image sets none.
RUN --mount=type=bind,source=pyproject.toml,target=/needs/pyproject.toml \
    --mount=type=cache,target=/var/cache/pip \
    python3 -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
        >/tmp/torch.txt \
    && python3 -c 'import tomllib; \
        project = tomllib.load(open("/needs/pyproject.toml", "rb"))["project"]; \
        print(*project["dependencies"], sep="\n")' \
        >/tmp/needs.txt \
    && pip install --cache-dir /var/cache/pip --constraint /tmp/torch.txt --requirement /tmp/needs.txt \
    && rm /tmp/torch.txt /tmp/needs.txt
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

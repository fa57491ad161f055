# Megatron and megatron_laer on NGC's PyTorch image, which has torch, Transformer Engine, NCCL and the
# InfiniBand libraries, built for each other. IMAGE is its address, with a tag, as the catalog has it
# (https://catalog.ngc.nvidia.com/orgs/nvidia/containers/pytorch); the image needs Python 3.12 and
# torch 2.8 or newer. From the top of the repository, with BuildKit (Docker 23 and newer):
#
#   docker build --file scripts/docker/ngc.Dockerfile --build-arg IMAGE=ADDRESS:TAG \
#       --tag megatron_laer:ngc .
ARG IMAGE

FROM ${IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY configs configs
COPY megatron_laer megatron_laer
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${IMAGE}
# A pipeline fails with any of its commands.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY pretrain_gpt.py /opt/megatron_laer/
# The image's own torch stays: its version is a constraint, beside those that the image has set.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
        >/tmp/torch.txt \
    && pip install --no-cache-dir --constraint /tmp/torch.txt /wheels/*.whl \
    && rm /tmp/torch.txt
# Imports torch and Megatron, so that what is missing shows now; no GPU is needed.
RUN megatron-laer flags tiny-moe \
    | xargs megatron-laer check-recipe -- --expert-model-parallel-size 8
WORKDIR /workspace
CMD ["megatron-laer", "doctor"]

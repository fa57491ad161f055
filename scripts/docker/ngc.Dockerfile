# Megatron and megatron_laer on NGC's PyTorch image, which has torch, Transformer Engine, NCCL and the
# InfiniBand libraries, built for each other. IMAGE is its address, with a tag, as the catalog has it
# (https://catalog.ngc.nvidia.com/orgs/nvidia/containers/pytorch); the image needs Python 3.12 and
# torch 2.8 or newer. From the top of the repository:
#
#   docker build --file scripts/docker/ngc.Dockerfile --build-arg IMAGE=ADDRESS:TAG \
#       --tag megatron_laer:ngc .
ARG IMAGE
FROM ${IMAGE}
WORKDIR /opt/megatron_laer
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE pretrain_gpt.py ./
COPY configs configs
COPY megatron_laer megatron_laer
# The image's own torch stays: its version is a constraint, beside those that the image has set.
RUN python3 -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
        >/tmp/torch.txt \
    && pip install --no-cache-dir --constraint /tmp/torch.txt . \
    && rm -r /tmp/torch.txt build
# Imports torch and Megatron, so that what is missing shows now; no GPU is needed.
RUN megatron-laer flags tiny-moe \
    | xargs megatron-laer check-recipe -- --expert-model-parallel-size 8
WORKDIR /workspace
CMD ["megatron-laer", "doctor"]

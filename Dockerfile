# docker build -t neon . && docker run --rm neon make demo
# On GPUs: docker build --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 -t neon . && docker run --rm --gpus all neon …
# PyTorch's wheels have their own CUDA libraries; the host's driver does the rest.
ARG BASE=ubuntu:24.04
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /neon
COPY . .
RUN make setup
ENV PATH=/neon/.venv/bin:$PATH
CMD ["make", "demo"]

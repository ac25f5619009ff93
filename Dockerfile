# The server in an image: `docker build -t ernie-serve .`, then `docker run --gpus all -p 8000:8000 ernie-serve`.
# docs/deploy.md says how to run it. BASE_IMAGE is any Debian or Ubuntu with Python 3.11 to 3.13; CUDA's libraries come
# with torch's wheel and the driver comes from the host, so no CUDA image is needed.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
# PyPI's torch is built for CUDA and brings Triton; https://download.pytorch.org/whl/cpu has the small one for a CPU.
# constraints.txt pins its version and everybody else's.
ARG TORCH_INDEX=
ARG EXTRAS=postgres
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
# A pip.conf of the place where the image is built is a secret: it is there while pip runs and in no layer.
# docker build --secret id=pip,src=FILE
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,mode=0444 \
    python3 -m venv /opt/ernie-serve \
    && /opt/ernie-serve/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
COPY pyproject.toml README.md LICENSE ./
COPY ernie_serve ernie_serve
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,mode=0444 \
    /opt/ernie-serve/bin/pip install --constraint constraints.txt ".${EXTRAS:+[${EXTRAS}]}"

FROM ${BASE_IMAGE}
# The compiler is no build tool left behind: Triton compiles its launchers with gcc and Python's headers when a kernel
# first runs, and the CPU's kernels are compiled at first use with g++ and ninja. One compiler serves both.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ ninja-build python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 ernie && useradd --uid 10001 --gid 10001 --no-log-init --create-home ernie \
    && install -d -o ernie -g ernie -m 0750 \
        /var/lib/ernie-serve /var/lib/ernie-serve/hub /var/lib/ernie-serve/store /var/cache/ernie-serve
COPY --from=build /opt/ernie-serve /opt/ernie-serve
COPY configs /srv/ernie-serve/configs
# Checkpoints of the hub; what must outlive the container (the billing store); what is compiled at first use.
ENV PATH=/opt/ernie-serve/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/lib/ernie-serve/hub \
    XDG_DATA_HOME=/var/lib/ernie-serve/store \
    XDG_CACHE_HOME=/var/cache/ernie-serve \
    TRITON_CACHE_DIR=/var/cache/ernie-serve/triton \
    TORCH_EXTENSIONS_DIR=/var/cache/ernie-serve/torch_extensions \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ERNIE_SERVE_HOST=0.0.0.0 \
    ERNIE_SERVE_PORT=8000 \
    ERNIE_SERVE_ADDRESS_FILE=/tmp/ernie-serve.url
VOLUME ["/var/lib/ernie-serve/hub", "/var/lib/ernie-serve/store", "/var/cache/ernie-serve"]
WORKDIR /srv/ernie-serve
USER 10001:10001
EXPOSE 8000
# Alive is what a restart can mend; that weights still load is asked of /health/ready. The server says where it listens,
# whatever told it so; a proxy that the environment names is not asked.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; url = open(os.environ['ERNIE_SERVE_ADDRESS_FILE']).read().strip(); r.build_opener(r.ProxyHandler({})).open(url + '/health/live', timeout=4)"]
# The server is process 1 and hears SIGTERM itself: it takes no more requests and lets the running ones end.
STOPSIGNAL SIGTERM
ENTRYPOINT ["ernie-serve"]
CMD ["serve", "--config", "configs/ernie-4.5-21b-a3b.toml"]

# Rootstock in a container. On a CPU:  docker build -t rootstock .
# On CUDA (the wheels bring their CUDA libraries; the host brings the driver and nvidia-container-toolkit):
#   docker build -t rootstock:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Another base image (a hardened one, a distribution's own CUDA image with Python 3.11+): --build-arg BASE_IMAGE=…

ARG BASE_IMAGE=python:3.11-slim-bookworm

# 1. The project as a wheel: both packages and the bundled base.
FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir -c requirements.lock hatchling
COPY bases/tiny ./bases/tiny
COPY adapters ./adapters
COPY service ./service
RUN /opt/build/bin/python -m hatchling build -t wheel -d /dist

# 2. Everything it needs, at the locked versions. torch first: it is the largest and changes least.
FROM ${BASE_IMAGE} AS packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY requirements.lock ./
RUN python -m venv /opt/rootstock \
    && /opt/rootstock/bin/pip install --no-cache-dir -c requirements.lock --extra-index-url "${TORCH_INDEX}" torch
COPY --from=wheel /dist /dist
RUN for wheel in /dist/*.whl; do \
        /opt/rootstock/bin/pip install --no-cache-dir -c requirements.lock --extra-index-url "${TORCH_INDEX}" \
            "${wheel}[postgres,s3]" || exit 1; \
    done

# 3. What runs: no compiler, no package cache, no root.
FROM ${BASE_IMAGE} AS final
LABEL org.opencontainers.image.title="rootstock" \
      org.opencontainers.image.licenses="Apache-2.0"
# bitsandbytes' CPU kernels are built on OpenMP. The version is the distribution's own, fixed by BASE_IMAGE.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin rootstock \
    && install -d -o 10001 -g 10001 /data
COPY --from=packages /opt/rootstock /opt/rootstock
ENV PATH=/opt/rootstock/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/data/hub \
    NUMBA_CACHE_DIR=/data/kernels \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ROOTSTOCK_HOST=0.0.0.0 \
    ROOTSTOCK_PORT=8000 \
    ROOTSTOCK_OPS_PORT=9400 \
    ROOTSTOCK_DATA_DIR=/data \
    ROOTSTOCK_LOG_FORMAT=json
USER 10001:10001
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8000 9400
# Ready means: the base is loaded and the engine answers. Kubernetes has probes of its own and ignores this.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['ROOTSTOCK_OPS_PORT'] + '/readyz', timeout=4)"]
ENTRYPOINT ["rootstock"]
CMD ["serve"]

# moe-lab on a CPU. The results of a run are below /work.
#   docker build -t moe-lab .
#   docker run --rm -v "$PWD:/work" moe-lab -m model=moe_layer router=torch,sinkhorn batch=1,8 device=cpu
# --build-arg PIP_EXTRA_INDEX_URL=... may name an index of CPU builds of torch, which are much smaller.
FROM python:3.11-slim AS wheel
COPY . /source
RUN python -m pip wheel --no-cache-dir --no-deps -w /wheel /source

FROM python:3.11-slim
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=export
# A compiler: for router=cuda_ext, and for execution=compile.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /
RUN --mount=from=wheel,source=/wheel,target=/wheel \
    python -m pip install --no-cache-dir -c /constraints.txt "$(echo /wheel/moe_lab-*.whl)[$EXTRAS]"
# Who owns the mounted folder: --build-arg USER_ID="$(id -u)".
ARG USER_ID=1000
RUN useradd --uid "$USER_ID" --create-home lab && mkdir /work && chown lab /work
USER lab
WORKDIR /work
ENTRYPOINT ["moe-lab"]
CMD ["--help"]

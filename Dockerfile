# posinv's environment, with the CUDA build of PyTorch. Checked by reading alone: not built yet.
#   docker build -t posinv .
#   docker run --gpus all --shm-size 8g -it posinv egs/mini/enh1/run.sh --ngpu 1
# For CPUs: docker build --build-arg SETUP_OPTIONS="--torch-backend cpu" -t posinv .
FROM python:3.12-slim
# gcc compiles PESQ; procps has the pgrep that recipes use; git tells results their commit.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev procps \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /posinv
COPY . .
ARG SETUP_OPTIONS=""
RUN UV_CACHE_DIR=/tmp/uv PIP_NO_CACHE_DIR=1 UV_LINK_MODE=copy tools/setup.sh $SETUP_OPTIONS \
    && rm -rf /tmp/uv
CMD ["bash"]

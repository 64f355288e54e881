# The command with a CPU build of torch, by default:
#   docker build -t wanda-lightning .                                      # with CUDA: --build-arg TORCH=cu130
#   docker run --rm -v "$PWD:/models" wanda-lightning prune MODEL --sparsity 0.6
# Models and results are in the folder that is mounted; for a GPU add `--gpus all` to `docker run`.
FROM python:3.11-slim

ARG TORCH=cpu
ARG VERSION=0.1.0.dev0
ENV SETUPTOOLS_SCM_PRETEND_VERSION=$VERSION HF_HOME=/models/.huggingface

COPY . /source
RUN pip install --no-cache-dir uv && \
    uv pip install --system --no-cache --torch-backend=$TORCH -c /source/constraints.txt "/source[eval,lora,plot]"

WORKDIR /models
ENTRYPOINT ["wanda-lightning"]
CMD ["--help"]

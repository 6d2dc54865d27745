# Training and generation on NVIDIA GPUs with CUDA 12.
# Not built: its pip line was resolved in a virtual environment with Python 3.12.
#   docker build -f docker/gpu.Dockerfile -t dicetalk .
#   docker run --gpus all -v /data:/data -v /runs:/runs dicetalk \
#     python -m dicetalk_jax.main --config=configs/diffusion.py --workdir=/runs/diffusion
# JAX's wheels bring CUDA and cuDNN. The host needs a driver and the NVIDIA Container
# Toolkit.
FROM python:3.12-slim

WORKDIR /dicetalk

# Dependencies first: they stay cached while the code changes.
COPY setup.cfg pyproject.toml README.md LICENSE NOTICE ./
COPY requirements requirements
COPY dicetalk_jax/__init__.py dicetalk_jax/
RUN pip install --no-cache-dir --constraint requirements/cuda12.lock \
  --editable '.[cuda12,train]'

COPY dicetalk_jax dicetalk_jax
COPY configs configs
COPY convert convert
COPY data_pipelines data_pipelines
